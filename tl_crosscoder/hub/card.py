"""Cards: what a reader needs to know of a published dictionary, and of a repository of several.

Contract: `dictionary_card` says what is in the run's files and nothing else; `repository_card`
keeps what others wrote around our list. Text from files stands in code spans or is escaped. Limit:
Markdown as the hub renders it.

The `README.md` of an export: what it is, exact or how far not, and how SAELens loads it.

Contract: Markdown from sites and numbers; names stand in code spans. Limit: the code in it runs in
the folder of the export.
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
from tl_crosscoder.hub.published_run import SAELENS_FOLDER, PublishedRun
from tl_crosscoder.models.pretrained import PREFIX
from tl_crosscoder.models.site import Site

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


HEAD = """---
library_name: saelens
tags: [crosscoder, model-diffing, sparse-autoencoder]
---

# {title}

{what}

| | site | model | hook point | width |
|---|---|---|---|---|
{sites}

"""
LOAD = """```python
import torch
from sae_lens import SAE

sae = SAE.load_from_disk(".")
{use}
```

Activations are raw: scales of the training are folded in.
"""
SIDE_BY_SIDE = "x = torch.cat([{acts}], dim=-1)  # [..., {d_in}], of the same tokens"


def concat_card(sites: Sequence[Site], d_sae: int) -> str:
    """Of all sites in and all out."""
    what = (
        f"A crosscoder of {d_sae:,} latents as a plain SAELens `JumpReLUSAE` over the activations "
        "of its sites side by side. **Exact**: codes and reconstructions are those of the "
        "crosscoder."
    )
    use = [
        _side_by_side(sites),
        f"codes = sae.encode(x)  # [..., {d_sae}]",
        f"parts = sae.decode(codes).split({[s.d_model for s in sites]}, dim=-1)  # one a site",
    ]
    return _card("Crosscoder over all its sites", what, sites, use)


def transcoder_card(sites: Sequence[Site], at: int, d_sae: int) -> str:
    """Of all sites in and one out."""
    what = (
        f"A crosscoder of {d_sae:,} latents as a SAELens `JumpReLUTranscoder`: from the "
        f"activations of all its sites side by side to those of {code(sites[at].name)} alone. "
        "**Exact**: codes and reconstruction are those of the crosscoder."
    )
    use = [
        _side_by_side(sites),
        f"codes = sae.encode(x)  # [..., {d_sae}]",
        f"x_hat = sae.decode(codes)  # [..., {sites[at].d_model}], of site {at}",
    ]
    return _card("Crosscoder to one of its sites", what, sites, use)


def site_card(
    sites: Sequence[Site], at: int, d_sae: int, *, quality: Mapping[str, Any], n_fitted: int
) -> str:
    """Of one site in and out, with what was measured (the fields of `SiteQuality`)."""
    site = sites[at]
    what = (
        f"**Approximate.** A crosscoder of {d_sae:,} latents as a SAELens `JumpReLUSAE` of "
        f"{code(site.label)} alone, at {code(site.hook_name)}. The crosscoder reads all its sites; "
        "here the others are estimated from this one, affinely (ridge regression on "
        f"{n_fitted:,} tokens), and the estimate is folded into the encoder. The decoder is the "
        "crosscoder's."
    )
    use = [f"codes = sae.encode(x)  # x: [..., {site.d_model}], of site {at} alone"]
    rows = [
        ("fraction of variance unexplained", number(quality["fvu"], ".4f"),
         number(quality["fvu_of_crosscoder"], ".4f")),
        ("active latents a token (L0)", number(quality["l0"], ".2f"),
         number(quality["l0_of_crosscoder"], ".2f")),
    ]  # fmt: skip
    overlap = [(n, number(quality[n], ".3f")) for n in ("precision", "recall", "jaccard")]
    fve = ", ".join(f"{code(n)} {number(v, '.4f')}" for n, v in quality["estimate_fve"].items())
    measured = [
        f"## How near it comes, on {quality['n_tokens']:,} other tokens",
        "",
        "| | this SAE | the crosscoder |",
        "|---|---|---|",
        *(f"| {name} | {ours} | {exact} |" for name, ours, exact in rows),
        "",
        "Active (token, latent) pairs against the crosscoder's: "
        + ", ".join(f"{name} {value}" for name, value in overlap)
        + f". The estimate explains of the variance of the other sites: {fve}.",
        "",
        "With `HookedSAETransformer` or `SAETransformerBridge`: "
        "`model.run_with_cache_with_saes(tokens, saes=[sae])`.",
        "",
    ]
    return _card("One model's side of a crosscoder", what, sites, use) + "\n" + "\n".join(measured)


def _side_by_side(sites: Sequence[Site]) -> str:
    acts = ", ".join(f"x_{i}" for i in range(len(sites)))
    return SIDE_BY_SIDE.format(acts=acts, d_in=sum(s.d_model for s in sites))


def _card(title: str, what: str, sites: Sequence[Site], use: Sequence[str]) -> str:
    rows = (
        f"| x_{i} | {code(s.name)} | {_model(s)} | {code(s.hook_name)} | {s.d_model} |"
        for i, s in enumerate(sites)
    )
    head = HEAD.format(title=title, what=what, sites="\n".join(rows))
    return head + LOAD.format(use="\n".join(use))


def _model(site: Site) -> str:
    adapter = "" if site.adapter is None else f" with adapter {code(site.adapter)}"
    at = "" if site.revision is None else f" at revision {code(site.revision)}"
    minus = "" if site.minus is None else f", minus {_model(site.minus)}"
    return f"{code(site.model_name)}{adapter}{at}{minus}"
