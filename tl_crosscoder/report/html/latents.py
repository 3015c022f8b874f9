"""Records of latents for the report, and effects of a run's latents on the next token's logits.

Contract: plain values, which are JSON as they are: NaN is None, numbers have few digits, tokens are
as `shown` makes them. Limit: the strongest examples, and a few from each fifth of the weaker ones;
effects on the logits need a hook on the residual stream.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from tl_crosscoder import files
from tl_crosscoder.analysis.example_database import ExampleDatabase, StoredExample
from tl_crosscoder.analysis.firing import POSITIONS, find_active
from tl_crosscoder.analysis.latents import LatentMeasures, RankedLatent, Ranking
from tl_crosscoder.analysis.lens import (
    LogitEffect,
    LogitEffects,
    Readout,
    direction_logits,
    logit_effect,
    n_tokens,
)
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.files import JUDGED_CHANGES_NAME, JUDGED_NAME
from tl_crosscoder.interventions.changes_result import Change
from tl_crosscoder.report.html.shifts import Shifts
from tl_crosscoder.report.token_panels import shown, token_namer
from tl_crosscoder.run.run import Run

N_HISTOGRAM_TOKENS, N_BINS, N_SIMILAR = 16_384, 40, 5
_ROWS = 64
"""Latents that are compared with all others at a time."""
N_TOP, N_QUANTILE = 10, 2
"""Examples of a latent: the largest activations, and the largest of each bin of the sample."""
_MAIN_SHARE = 0.5
"""A latent belongs to a role, or a source, with more than this share of its active tokens."""
Record = dict[str, Any]


def effects_on_logits(run: Run, latents: Sequence[int], *, n: int) -> LogitEffects:
    """The n tokens that each latent promotes most, and the n that it suppresses most.

    Raises ValueError for a hook off the residual stream, and for sites of unequal width.
    """
    models, crosscoder, ids = run.models, run.crosscoder, list(latents)
    if models.compared is not None:
        found = logit_effect(models, crosscoder, ids, n=n)
    else:
        (site,) = [site.name for site in models.sites]
        found = direction_logits(models, crosscoder.decoder(0).detach()[ids], site=site, n=n)
        rows = tuple(replace(row, latent=ids[row.latent]) for row in found.rows)
        found = replace(found, rows=rows)
    name = token_namer(run.models.tokenizer)
    return replace(found, rows=tuple(replace(r, token=name(r.token_id)) for r in found.rows))


def logit_histograms(run: Run, latents: Sequence[int]) -> dict[int, Record]:
    """Counts of the vocabulary's tokens by each latent's effect on their logits, in equal bins.

    Of the decoder rows' difference where there is a pair, read by the fine-tuned model.

    Raises ValueError for a hook off the residual stream, and for sites of unequal width.
    """
    models, crosscoder, found = run.models, run.crosscoder, {}
    if models.compared is not None and not models.is_difference:
        i, j = models.check_one_width()
        rows = crosscoder.decoder(j).detach() - crosscoder.decoder(i).detach()
    else:
        j, rows = len(models.sites) - 1, crosscoder.decoder(0).detach()
    readout = Readout.of(models.models[j], d_vocab=n_tokens(models))
    for part in torch.tensor(list(latents)).split(_ROWS):
        logits = readout.logits(rows[part.to(rows.device)]).cpu()
        for latent, own in zip(part.tolist(), logits, strict=True):
            low, high = own.min().item(), own.max().item()
            if low < high:
                counts = own.histc(N_BINS, low, high).int().tolist()
                found[latent] = {"counts": counts, "least": rounded(low, 3)}
                found[latent] |= {"most": rounded(high, 3), "n": len(own)}
    return found


def histograms(run: Run, latents: Sequence[int]) -> dict[int, Record]:
    """Counts of each latent's activations on held-out text, in bins of equal width from 0 on.

    Raises ValueError or FileNotFoundError where there is no text to run over.
    """
    source, contexts = run.measured()
    text = run.some(contexts, N_HISTOGRAM_TOKENS)
    active, found = find_active(source, run.crosscoder, text, latents=latents), {}
    for latent in latents:
        _, values = active.of(latent)
        if len(values):
            most = values.max().item()
            counts = values.histc(N_BINS, 0, most).int().tolist()
            ends = {"least": 0, "most": rounded(most, 3)}
            found[latent] = {"counts": counts, **ends, "n": len(values)}
    return found


def similar_latents(
    crosscoder: Crosscoder, latents: Sequence[int]
) -> dict[int, list[tuple[int, float]]]:
    """For each of some latents those whose decoder rows, of all sites together, are nearest."""
    rows = torch.nn.functional.normalize(crosscoder.W_dec.detach().float(), dim=1)
    n = min(N_SIMILAR + 1, len(rows))
    found = {}
    for part in torch.tensor(list(latents)).split(_ROWS):
        nearest = (rows[part.to(rows.device)] @ rows.T).topk(n, dim=1)
        each = zip(part.tolist(), nearest.indices.tolist(), nearest.values.tolist(), strict=True)
        for latent, near, cosines in each:
            pairs = [(j, rounded(c, 3)) for j, c in zip(near, cosines, strict=True) if j != latent]
            found[latent] = pairs[:N_SIMILAR]
    return found


def judged_names(folder: Path) -> dict[int, str]:
    """Names of latents by a language model, where there are any in a run's folder."""
    path = folder / JUDGED_NAME
    if not path.is_file():
        return {}
    return {row["latent"]: row["name"] for row in files.read_object(path, rows=list)["rows"]}


def judged_changes(folder: Path, changes: Sequence[Change]) -> list[str]:
    """What a language model says of each change; empty of one that it has not been asked about."""
    path = folder / JUDGED_CHANGES_NAME
    rows = files.read_object(path, rows=list)["rows"] if path.is_file() else []
    said = {tuple(row["latents"]): ". ".join(filter(None, [row["name"], row["explanation"]]))
            for row in rows}  # fmt: skip
    return [said.get(tuple(change.latents), "") for change in changes]


def latent_records(
    ranking: Ranking,
    latents: LatentMeasures,
    crosscoder: Crosscoder,
    *,
    database: ExampleDatabase | None,
    effects: LogitEffects | None,
    counted: Mapping[int, Record] = MappingProxyType({}),
    counted_logits: Mapping[int, Record] = MappingProxyType({}),
    shifts: Shifts | None = None,
    named: Mapping[int, str] = MappingProxyType({}),
    changes: Sequence[Change] = (),
) -> list[Record]:
    """Records in the order of the ranking; what is not given is left out of them.

    Raises ValueError for examples of another dictionary.
    """
    if database is not None and database.d_sae != crosscoder.cfg.d_sae:
        raise ValueError(
            f"the examples are of {database.d_sae:,} latents, but the dictionary has "
            f"{crosscoder.cfg.d_sae:,}. Collect them again with `tl-crosscoder analyze --fresh`."
        )
    norms, names = crosscoder.decoder_norms().tolist(), [site.name for site in crosscoder.sites]
    by_latent: dict[int, list[LogitEffect]] = {}
    for effect in effects.rows if effects else ():
        by_latent.setdefault(effect.latent, []).append(effect)
    similar = similar_latents(crosscoder, ranking.latents) if ranking.rows else {}
    return [
        _measured(row, latents)
        | {
            "name": named.get(row.latent),
            "histogram": counted.get(row.latent),
            "logit_histogram": counted_logits.get(row.latent),
            "similar": similar[row.latent],
            # Place of the change, its number of latents, and what ablating them undoes.
            "changes": [
                (place, len(c.latents), plain_number(c.necessity))
                for place, c in enumerate(changes, start=1)
                if row.latent in c.latents
            ],
            # Lengths of its rows, in the space where sites have one size.
            "norms": [*zip(names, map(rounded, norms[row.latent]), strict=True)],
            "examples": _examples(database.latent(row.latent), shifts or {}) if database else [],
            "logits": _logits(by_latent.get(row.latent, [])),
        }
        for row in ranking.rows
    ]


def _measured(row: RankedLatent, latents: LatentMeasures) -> Record:
    j, firing, own = row.latent, latents.firing, latents.scaling.get("finetuned")
    counts = {
        "roles": (ROLES, firing.n_active_by_role, firing.tokens_by_role),
        "sources": (firing.sources, firing.n_active_by_source, firing.tokens_by_source),
        "positions": (POSITIONS, firing.n_active_by_position, firing.tokens_by_position),
    }
    # Name, tokens of it on which the latent is active, tokens of it; of the names that there are.
    active_on = {
        kind: [(name, int(n), of) for name, n, of in zip(names, found[:, j].tolist(), seen,
                                                         strict=True) if of]
        for kind, (names, found, seen) in counts.items()
    }  # fmt: skip
    n_active = sum(n for _, n, _ in active_on["roles"])
    main = [role for role, n, _ in active_on["roles"] if n > _MAIN_SHARE * n_active]
    main_source = [source for source, n, _ in active_on["sources"] if n > _MAIN_SHARE * n_active]
    return {
        "latent": j,
        "ranked": {name: plain_number(value) for name, value in asdict(row).items()},
        "encoder_cosine": plain_number(latents.encoder_cosine[j].item()),
        "mean_code": plain_number(firing.mean_code[j].item()),
        "max_code": plain_number(firing.max_code[j].item()),
        "is_specific": own is not None and bool(own.is_specific[j]),
        "scaling": [
            (name, *(plain_number(nu[j].item()) for nu in (t.nu_error, t.nu_reconstruction)))
            for name, t in latents.scaling.items()
        ],
        "main_role": main[0] if main else "mixed",
        "main_source": main_source[0] if main_source else "mixed",
        **active_on,
    }


def _examples(stored: Iterable[StoredExample], shifts: Shifts) -> list[Record]:
    return [
        {
            "quantile": example.quantile,  # 0 the weakest; None of the largest activations
            "value": rounded(example.value),
            "at": example.at,  # which of the tokens the value is of
            "role": example.role,
            "source": example.source,
            "tokens": [shown(token) for token in example.tokens],
            "codes": [rounded(code, 3) if code else 0 for code in example.activations],
            "shifts": _window(shifts.get(example.context, []), example),
        }
        for example in stored
        if example.rank < (N_TOP if example.quantile is None else N_QUANTILE)
    ]


def _window(values: Sequence[float | None], example: StoredExample) -> list[float | None]:
    """Those of the example's tokens."""
    start = example.position - example.at
    return [*values[start : start + len(example.tokens)]]


def _logits(effects: Sequence[LogitEffect]) -> list[Record]:
    """Tokens that each direction promotes and suppresses most, with centred logits."""
    records: dict[str, Record] = {}
    for effect in effects:
        empty: Record = {"direction": effect.direction, "promoted": [], "suppressed": []}
        own = records.setdefault(effect.direction, empty)
        kind = "promoted" if effect.is_promoted else "suppressed"
        own[kind].append((shown(effect.token), rounded(effect.logit, 3)))
    return [*records.values()]


def rounded(value: float, digits: int = 4) -> float:
    """Fewer digits make a smaller page."""
    return float(f"{value:.{digits}g}")


def plain_number(value: Any) -> Any:
    """NaN and infinity as None, other floats rounded, the rest as it is."""
    if not isinstance(value, float):
        return value
    return rounded(value) if math.isfinite(value) else None
