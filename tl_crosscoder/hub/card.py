"""Cards: the `README.md` of a dictionary, of a repository of several, and of an export.

Text is made by the templates beside this module and holds what is in the run's files and nothing
else; `repository_card` keeps what others wrote around our list. Text from files stands in code
spans or is escaped. Limit: Markdown as the hub renders it.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tl_crosscoder.hub.published_run import SAELENS_FOLDER, PublishedRun
from tl_crosscoder.hub.registry import Entry
from tl_crosscoder.models.pretrained import PREFIX
from tl_crosscoder.models.site import Site
from tl_crosscoder.results.measures import DIRECTIONS, MEASURES

TAGS = ["crosscoder", "model-diffing", "mechanistic-interpretability", "sparse-autoencoder"]
START, END = "<!-- tl_crosscoder: dictionaries -->", "<!-- tl_crosscoder: end -->"
"""Marks around our list in a repository's card."""


def dictionary_card(
    run: PublishedRun, *, id: str, repo: str | None, licence: str | None, release: str | None = None
) -> str:
    """The card of one dictionary.

    Args:
        run: what is published.
        id: its name in the repository, or in the registry.
        repo: the repository; None for one that travels with the package.
        licence: an identifier of the hub.
        release: release in the registry, where it travels with the package.
    """
    training = {} if run.record is None else run.record["training"]
    mixture = training.get("mixture") or []
    texts = [f"{s['text']} (weight {s.get('weight', 1):g})" for s in mixture]
    return _rendered(
        "dictionary",
        id=id,
        repo=repo,
        release=release,
        licence=licence,
        embedded_name=f"{PREFIX}{run.folder.name}" if repo is None else None,
        saelens=SAELENS_FOLDER,
        entry=entry_of(run, id=id, repo=repo or ""),
        d_in=run.cfg["d_in"],
        sites=run.sites,
        is_difference=run.sites[0].minus is not None,
        is_stacked=len({s.d_model for s in run.sites}) == 1,
        has_embedded=any(s.label.startswith(PREFIX) for s in run.read_sites),
        imported=run.cfg["metadata"].get("imported_from"),
        record=run.record,
        texts=texts or [text for text in [training.get("text")] if text],
        measurement=run.measurement,
        answer=run.answer,
        scaling=_scaling(run),
        patching=_recovery(run),
        candidates=None if run.patching is None else run.patching.candidates,
        causal={n: t for n, t in run.causal_tests.items() if not n.startswith("baselines")},
    )


def entry_of(run: PublishedRun, *, id: str, repo: str) -> Entry:
    """A run as a line in the list of a repository."""
    return Entry.from_files(repo, id, cfg=run.cfg, record=run.record, analysis=run.analysis)


def repository_card(
    repo: str, entries: Sequence[Entry], *, metadata: Mapping[str, Any], existing: str | None
) -> str:
    """The card of a repository, with our list inserted or renewed.

    Args:
        repo: its name.
        entries: all dictionaries of ours in it.
        metadata: front matter: added to what is there, of which lists are kept.
        existing: the card that is there, or None.
    """
    from huggingface_hub import ModelCard, ModelCardData

    ours = _rendered("repository", repo=repo, entries=entries, saelens=SAELENS_FOLDER)
    ours = f"{START}\n{ours.strip()}\n{END}"
    card = None if existing is None else ModelCard(existing)
    front, text = ({}, "") if card is None else (card.data.to_dict(), card.text)
    for name, value in metadata.items():
        kept = front.get(name, [])
        old = [kept] if isinstance(kept, str) else list(kept or [])
        front[name] = [*dict.fromkeys([*old, *value])] if isinstance(value, list) else value
    before, mark, rest = text.partition(START)
    _, _, after = rest.partition(END)
    body = f"{before}{ours}{after}" if mark else f"{text}\n\n{ours}"
    return f"---\n{ModelCardData(**front).to_yaml()}\n---\n\n{body.strip()}\n"


def export_card(
    kind: str,
    sites: Sequence[Site],
    d_sae: int,
    *,
    at: int = 0,
    quality: Mapping[str, Any] | None = None,
    n_fitted: int = 0,
) -> str:
    """The card of an export, with how SAELens loads it.

    Args:
        kind: `concat`, `transcoder` or `site`.
        sites: of the crosscoder.
        d_sae: number of latents.
        at: which site is written, for the last two kinds.
        quality: fields of `SiteQuality`, for `site`.
        n_fitted: tokens that its estimate was fitted on.
    """
    return _rendered(
        "export",
        kind=kind,
        sites=sites,
        d_sae=d_sae,
        site=sites[at],
        at=at,
        quality=quality,
        n_fitted=n_fitted,
    )


def hub_models(run: PublishedRun) -> list[str]:
    """Models and adapters of the sites that have the form of a repository of the hub."""
    names = [n for s in run.read_sites for n in (s.model_name, s.adapter) if n]
    is_repository = re.compile(r"[\w.-]+/[\w.-]+").fullmatch
    found = [n for n in names if is_repository(n) and not n.startswith(PREFIX)]
    return [*dict.fromkeys(n for n in found if not Path(n).exists())]


def _scaling(run: PublishedRun) -> list[tuple[str, int, int]]:
    """Direction, specific latents, active latents."""
    if run.measurement is None:
        return []
    latents = run.measurement.latents
    n_active = int((latents.n_active > 0).sum())
    return [
        (DIRECTIONS[name], int(table.is_specific.sum()), n_active)
        for name, table in latents.scaling.items()
    ]


def _recovery(run: PublishedRun) -> list[Any]:
    """Rows of KL recovery: all latents, the chosen sets, and the candidates by Delta-norm."""
    if run.patching is None:
        return []
    tokens = run.patching.rows[0].tokens
    rows = [r for r in run.patching.rows if r.tokens == tokens]
    return [r for r in rows if r.group == "chosen" or r.variant in ("all latents", "candidates")]


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown: what comes from files goes through one of these filters
    )
    filters = {"code": code, "plain": plain, "number": number, "measured": _measured}
    environment.filters |= filters
    environment.globals["m"] = MEASURES
    return environment


def _rendered(name: str, **values: Any) -> str:
    return _environment().get_template(f"{name}.md.jinja").render(values)


def _measured(value: float | None, name: str) -> str:
    """A number with the digits of its measure."""
    return number(value, MEASURES[name].form or ".3g")


def code(value: object) -> str:
    """A code span, in which no Markdown or HTML means anything."""
    text = " ".join(str(value).replace("`", "'").split())
    return "`" + text.replace("|", "\\|") + "`"


def plain(value: object) -> str:
    """Text in which no Markdown or HTML means anything."""
    text = html.escape(" ".join(str(value).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", text)


def number(value: float | None, form: str = ".3f") -> str:
    """A formatted number; `-` for none and NaN."""
    text = "-" if value is None or math.isnan(value) else format(value, form)
    return text if text.strip("-0.%") or text == "-" else text.removeprefix("-")
