"""What latents of a run say to the next token's logits, whatever its sites.

Contract: `logit_effect` of two models and of a difference, and the same of a single site; tokens
are called as `token_names` does, so that parts of characters can be told apart. Limit: hooks on the
residual stream.

What the report shows of each latent: measures, firing, examples, effect on the logits.

Contract: `LatentRecord`s of plain values, which are JSON as they are: NaN is None, numbers have few
digits, tokens are as `shown` makes them. Limit: the strongest examples, and a few from each fifth
of the weaker ones.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from tl_crosscoder.analysis.example_database import ExampleDatabase, StoredExample
from tl_crosscoder.analysis.firing import POSITIONS, Firing
from tl_crosscoder.analysis.latents import LatentMeasures, RankedLatent, Ranking
from tl_crosscoder.analysis.lens import LogitEffect, LogitEffects, direction_logits, logit_effect
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.report.token_panels import shown, token_namer
from tl_crosscoder.run.run import Run


def effects_on_logits(run: Run, latents: Sequence[int], *, n: int) -> LogitEffects:
    """The n tokens that each latent promotes most, and the n that it suppresses most.

    Raises ValueError for a hook off the residual stream, and for sites of unequal width.
    """
    found, name = _effects(run, list(latents), n), token_namer(run.models.tokenizer)
    rows = tuple(replace(row, token=name(row.token_id)) for row in found.rows)
    return replace(found, rows=rows)


def _effects(run: Run, latents: list[int], n: int) -> LogitEffects:
    models, crosscoder = run.models, run.crosscoder
    if models.compared is not None:
        return logit_effect(models, crosscoder, latents, n=n)
    (site,) = [site.name for site in models.sites]
    found = direction_logits(models, crosscoder.decoder(0).detach()[latents], site=site, n=n)
    rows = tuple(replace(row, latent=latents[row.latent]) for row in found.rows)
    return replace(found, rows=rows)


N_TOP, N_QUANTILE = 10, 2
"""Examples of a latent: the largest codes, and the largest of each bin of the sample."""
_MAIN_SHARE = 0.5
"""A latent belongs to a role with more than this share of its active tokens."""
Counts = list[tuple[str, int, int]]
"""Name, tokens of it on which the latent is active, tokens of it."""


@dataclass(frozen=True, kw_only=True)
class ExampleRecord:
    """One token in context."""

    quantile: int | None
    """Bin of the sample, 0 the weakest; None of the largest codes."""
    value: float
    at: int
    """Which of the tokens the value is of."""
    role: str
    source: str
    tokens: list[str]
    codes: list[float]


@dataclass(frozen=True, kw_only=True)
class LogitRecord:
    """Tokens that one direction promotes and suppresses most, with centred logits."""

    direction: str
    promoted: list[tuple[str, float]]
    suppressed: list[tuple[str, float]]


@dataclass(frozen=True, kw_only=True)
class LatentRecord:
    """One latent; `ranked` are the fields of `RankedLatent`."""

    latent: int
    ranked: dict[str, Any]
    encoder_cosine: float | None
    mean_code: float | None
    max_code: float | None
    is_specific: bool
    """By Latent Scaling of its fine-tuned row (Minder et al. 2025)."""
    norms: list[tuple[str, float]]
    """By site: length of its row, in the space where sites have one size."""
    scaling: list[tuple[str, float | None, float | None]]
    """By direction: nu of the error and of the reconstruction."""
    main_role: str
    """The role of most of its active tokens, or `mixed`."""
    roles: Counts
    sources: Counts
    positions: Counts
    examples: list[ExampleRecord] = field(default_factory=list)
    logits: list[LogitRecord] = field(default_factory=list)


def latent_records(
    ranking: Ranking,
    latents: LatentMeasures,
    crosscoder: Crosscoder,
    *,
    database: ExampleDatabase | None,
    effects: LogitEffects | None,
) -> list[LatentRecord]:
    """In the order of the ranking; without a database or effects, without these.

    Raises ValueError for examples of another dictionary.
    """
    if database is not None and database.d_sae != crosscoder.cfg.d_sae:
        raise ValueError(
            f"the examples are of {database.d_sae:,} latents, but the dictionary has "
            f"{crosscoder.cfg.d_sae:,}. Collect them again with `tl-crosscoder analyze --fresh`."
        )
    norms = crosscoder.decoder_norms().tolist()
    by_latent: dict[int, list[LogitEffect]] = {}
    for effect in effects.rows if effects else ():
        by_latent.setdefault(effect.latent, []).append(effect)
    names = [site.name for site in crosscoder.sites]
    return [
        _record(
            row,
            latents,
            norms=[(name, rounded(value)) for name, value in zip(names, norms[row.latent],
                                                                 strict=True)],
            examples=_examples(database.latent(row.latent)) if database else [],
            logits=_logits(by_latent.get(row.latent, [])),
        )
        for row in ranking.rows
    ]  # fmt: skip


def _record(
    row: RankedLatent,
    latents: LatentMeasures,
    *,
    norms: list[tuple[str, float]],
    examples: list[ExampleRecord],
    logits: list[LogitRecord],
) -> LatentRecord:
    j, firing, own = row.latent, latents.firing, latents.scaling.get("finetuned")
    roles = _counts(ROLES, firing.n_active_by_role[:, j].tolist(), firing.tokens_by_role)
    return LatentRecord(
        latent=j,
        ranked={f.name: plain_number(getattr(row, f.name)) for f in fields(row)},
        encoder_cosine=plain_number(latents.encoder_cosine[j].item()),
        mean_code=plain_number(firing.mean_code[j].item()),
        max_code=plain_number(firing.max_code[j].item()),
        is_specific=own is not None and bool(own.is_specific[j]),
        norms=norms,
        scaling=[
            (
                name,
                plain_number(table.nu_error[j].item()),
                plain_number(table.nu_reconstruction[j].item()),
            )
            for name, table in latents.scaling.items()
        ],
        main_role=_main_role(roles),
        roles=roles,
        sources=_by_source(firing, j),
        positions=_counts(
            POSITIONS, firing.n_active_by_position[:, j].tolist(), firing.tokens_by_position
        ),
        examples=examples,
        logits=logits,
    )


def _by_source(firing: Firing, latent: int) -> Counts:
    n_active = firing.n_active_by_source[:, latent].tolist()
    return _counts(firing.sources, n_active, firing.tokens_by_source)


def _counts(names: Sequence[str], n_active: Sequence[float], n_tokens: Sequence[int]) -> Counts:
    """Of the names that the text has."""
    return [
        (name, int(active), seen)
        for name, active, seen in zip(names, n_active, n_tokens, strict=True)
        if seen
    ]


def _main_role(roles: Counts) -> str:
    total = sum(n for _, n, _ in roles)
    return next((role for role, n, _ in roles if n > _MAIN_SHARE * total), "mixed")


def _examples(stored: Iterable[StoredExample]) -> list[ExampleRecord]:
    return [
        ExampleRecord(
            quantile=example.quantile,
            value=rounded(example.value),
            at=example.at,
            role=example.role,
            source=example.source,
            tokens=[shown(token) for token in example.tokens],
            codes=[rounded(code, 3) for code in example.activations],
        )
        for example in stored
        if example.rank < (N_TOP if example.quantile is None else N_QUANTILE)
    ]


def _logits(effects: Sequence[LogitEffect]) -> list[LogitRecord]:
    by_direction: dict[str, dict[bool, list[tuple[str, float]]]] = {}
    for effect in effects:
        own = by_direction.setdefault(effect.direction, {True: [], False: []})
        own[effect.is_promoted].append((shown(effect.token), rounded(effect.logit, 3)))
    return [
        LogitRecord(direction=direction, promoted=own[True], suppressed=own[False])
        for direction, own in by_direction.items()
    ]


def rounded(value: float, digits: int = 4) -> float:
    """Fewer digits make a smaller page."""
    return float(f"{value:.{digits}g}")


def plain_number(value: Any) -> Any:
    """NaN and infinity as None, other floats rounded, the rest as it is."""
    if not isinstance(value, float):
        return value
    return rounded(value) if math.isfinite(value) else None
