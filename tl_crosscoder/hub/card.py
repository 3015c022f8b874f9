"""Cards: what a reader needs to know of a published dictionary, and of a repository of several.

Contract: `dictionary_card` says what is in the run's files and nothing else; `repository_card`
keeps what others wrote around our list. Text from files stands in code spans or is escaped. Limit:
Markdown as the hub renders it.
"""

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from tl_crosscoder.crosscoder.config import ARCHITECTURE
from tl_crosscoder.embedded import PREFIX
from tl_crosscoder.hub.publish_files import SAELENS_FOLDER, PublishedRun

TAGS = ["crosscoder", "model-diffing", "mechanistic-interpretability", "sparse-autoencoder"]
START, END = "<!-- tl_crosscoder: dictionaries -->", "<!-- tl_crosscoder: end -->"
"""Marks of the part of a repository's card that is ours."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A dictionary in one line of a list."""

    id: str
    models: tuple[str, ...]
    hooks: tuple[str, ...]
    d_sae: int
    recipe: str | None
    l0: float | None
    fve: dict[str, float]
    """Per site, and of the `difference`; what has not been measured is left out."""

    @classmethod
    def of(
        cls,
        id: str,
        cfg: Mapping[str, Any],
        *,
        record: Mapping[str, Any] | None,
        analysis: Mapping[str, Any] | None,
    ) -> "Summary":
        """From the content of its files."""
        measured = (analysis or {}).get("reconstruction", {})
        # Of a diff-SAE the difference is a site itself.
        fve = {"difference": measured.get("difference_fve")} | dict(measured.get("fve", {}))
        order = sorted(fve, key=lambda name: name == "difference")
        sites = [s for own in cfg["sites"] for s in (own.get("minus"), own) if s]
        return cls(
            id=id,
            models=tuple(dict.fromkeys(s["adapter"] or s["model_name"] for s in sites)),
            hooks=tuple(dict.fromkeys(s["hook_name"] for s in sites)),
            d_sae=cfg["d_sae"],
            recipe=None if record is None else recipe_label(record),
            l0=measured.get("l0"),
            fve={name: fve[name] for name in order if fve[name] is not None},
        )


def recipe_label(record: Mapping[str, Any]) -> str:
    """`delta, k = 12, delta loss 1`: the preset, or else the sparsity, with what decides most."""
    sparsity, delta = record["sparsity"], record["delta_loss"]
    parts = [record["training"].get("preset") or sparsity["kind"]]
    parts += [f"k = {sparsity['k']:g}"] if "k" in sparsity else []
    parts += [f"delta loss {delta['weight']:g}"] if delta else []
    return ", ".join(parts)


def dictionary_card(
    run: PublishedRun, *, id: str, repo: str | None, licence: str | None, release: str | None = None
) -> str:
    """The card of one dictionary.

    Args:
        run: what is published.
        id: its name in the repository, or in the registry.
        repo: the repository; None of one that travels with the package.
        licence: an identifier of the hub.
        release: of an embedded dictionary, its release in the registry.
    """
    return _template("dictionary.md.jinja").render(
        id=id,
        repo=repo,
        release=release,
        licence=licence,
        embedded_name=f"{PREFIX}{run.folder.name}" if repo is None else None,
        saelens=SAELENS_FOLDER,
        summary=Summary.of(id, run.cfg, record=run.record, analysis=run.analysis),
        d_in=run.cfg["d_in"],
        sites=run.sites,
        is_difference=run.sites[0].minus is not None,
        is_stacked=len({s.d_model for s in run.sites}) == 1,
        has_embedded=any(s.label.startswith(PREFIX) for s in run.read_sites),
        imported=run.cfg["metadata"].get("imported_from"),
        record=run.record,
        texts=[] if run.record is None else _texts(run.record["training"]),
        measurement=run.measurement,
        scaling=_scaling(run),
        patching=_recovery(run),
        candidates=None if run.patching is None else run.patching.candidates,
        causal={n: t for n, t in run.causal_tests.items() if not n.startswith("baselines")},
    )


def repository_card(
    repo: str, summaries: Sequence[Summary], *, metadata: Mapping[str, Any], existing: str | None
) -> str:
    """The card of a repository, with our list put in or renewed.

    Args:
        repo: its name.
        summaries: all dictionaries of ours in it.
        metadata: front matter: added to what is there, of which lists are kept.
        existing: the card that is there, or None.
    """
    from huggingface_hub import ModelCard, ModelCardData

    ours = _template("repository.md.jinja").render(
        repo=repo, summaries=summaries, saelens=SAELENS_FOLDER
    )
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


def hub_models(run: PublishedRun) -> list[str]:
    """Models and adapters of the sites that have the form of a repository of the hub."""
    names = [n for s in run.read_sites for n in (s.model_name, s.adapter) if n]
    is_repository = re.compile(r"[\w.-]+/[\w.-]+").fullmatch
    found = [n for n in names if is_repository(n) and not n.startswith(PREFIX)]
    return [*dict.fromkeys(n for n in found if not Path(n).exists())]


def is_ours(cfg: Mapping[str, Any]) -> bool:
    """Whether a `cfg.json` is of a dictionary of this package."""
    return cfg.get("architecture") == ARCHITECTURE


def _texts(training: Mapping[str, Any]) -> list[str]:
    """Names of the texts, with their weights in a mixture."""
    mixture = training.get("mixture") or []
    named = [f"{s['text']} (weight {s.get('weight', 1):g})" for s in mixture]
    return named or ([training["text"]] if training.get("text") else [])


def _scaling(run: PublishedRun) -> list[tuple[str, int, int]]:
    """Direction, specific latents, living latents."""
    if run.measurement is None:
        return []
    names = {
        "finetuned": "of the fine-tuned rows",
        "base": "of the base rows",
        "random": "random directions (control)",
        "other": "other latents' rows (control)",
    }
    latents = run.measurement.latents
    n_alive = int((latents.n_active > 0).sum())
    return [
        (names[name], int(table.is_specific.sum()), n_alive)
        for name, table in latents.scaling.items()
    ]


def _recovery(run: PublishedRun) -> list[Any]:
    """Rows of KL recovery: all latents, the chosen sets, and the candidates by Delta-norm."""
    if run.patching is None:
        return []
    tokens = run.patching.rows[0].tokens
    rows = [r for r in run.patching.rows if r.tokens == tokens]
    return [r for r in rows if r.group == "chosen" or r.variant in ("all latents", "candidates")]


def _template(name: str) -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown: what comes from files goes through one of these filters
    )
    environment.filters |= {"code": code, "plain": plain, "number": number}
    return environment.get_template(name)


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
