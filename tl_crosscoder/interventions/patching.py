"""Patching for KL recovery: how much of what the fine-tune does goes through which latents?

    h_S = x^0 + sum_{j in S} f_j (d_j^1 - d_j^0)      the fine-tuned model goes on from h_S
    recovery(S) = 1 - KL(S) / KL(empty set)           KL(p_finetuned || p_{h_S}), nats a token

over the tokens that the assistant says, and the first of them (Minder et al. 2025; methods, section
4). Intervals are bootstraps over prompts, paired between variants. Limit: the hook's layer is the
only one patched, so KL(empty set) already tells how much of the fine-tune happens below it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.analysis.decoder_norms import LATENT_CLASSES, LatentClass
from tl_crosscoder.analysis.latent_measures import LatentMeasures
from tl_crosscoder.analysis.ranking import MIN_ACTIVE_TOKENS, nu_keys
from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.interventions.edits import (
    Edit,
    Places,
    Projection,
    Rebuilt,
    Remainder,
    Shift,
    Stream,
    Where,
)
from tl_crosscoder.interventions.running import EditScores, kinds_of, score_edits, unchanged
from tl_crosscoder.interventions.subject import Subject
from tl_crosscoder.resampling import N_DRAWS, bootstrap_weights, interval, ratio_interval
from tl_crosscoder.site_difference import SiteDifference
from tl_crosscoder.tables import TableOfRows

BASE, EVERYTHING = "base stream", "all latents"
N_RANDOM = 5
LEAST, SHARE = 10, 0.05
"""Where fewer latents are finetuned-only, this share of the living ones is taken."""


@dataclass(frozen=True, kw_only=True)
class PatchingRow:
    """One variant, on one kind of predicted token; intervals are at 95 %."""

    variant: str
    group: str
    """Heading under which tables and figures show it."""
    tokens: str
    """Kind of predicted token."""
    n_latents: int
    """Latents that are patched; 0 where it is none of them."""
    n_tokens: int
    n_prompts: int
    kl: float
    kl_low: float
    kl_high: float
    ce: float
    """Cross-entropy of the text, nats a token."""
    ce_low: float
    ce_high: float
    recovery: float
    """1 - KL / KL(base stream); NaN where that is 0."""
    recovery_low: float
    recovery_high: float


@dataclass(frozen=True, kw_only=True)
class PatchingResult(TableOfRows):
    """KL and recovery of every variant."""

    ROW: ClassVar[type] = PatchingRow
    rows: tuple[PatchingRow, ...]
    compared: tuple[str, str]
    """Names of the sites that stand for base and fine-tuned."""
    candidates: str
    """How the latents that are taken for the fine-tune's were chosen."""
    candidate_latents: tuple[int, ...]
    """Which they are, by Delta-norm, largest first."""

    def row(self, variant: str, tokens: str | None = None) -> PatchingRow:
        """One row; the first kind of token where none is named. Raises ValueError for none."""
        for row in self.rows:
            if row.variant == variant and tokens in (None, row.tokens):
                return row
        raise ValueError(
            f"there is no variant {variant!r} on {tokens or 'any'} tokens; there are "
            f"{sorted({r.variant for r in self.rows})} on {sorted({r.tokens for r in self.rows})}."
        )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table to be."""

    name: str
    group: str
    edit: Edit
    n_latents: int = 0


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """The latents taken for the fine-tune's, by Delta-norm, and how they were chosen."""

    latents: Int[Tensor, " n"]
    how: str


def patching(
    models: ComparedModels | SiteDifference,
    crosscoder: Crosscoder,
    text: TokenizedText,
    *,
    latents: LatentMeasures,
    extra: Mapping[str, Sequence[int]] | None = None,
    kinds: Mapping[str, Places] | None = None,
    compared: tuple[str, str] | None = None,
    batch_size: int = 16,
    n_draws: int = N_DRAWS,
    seed: int = 0,
    show_progress: bool = False,
) -> PatchingResult:
    """Patch every variant of methods, section 4, into the fine-tuned model.

    Args:
        models: a pair, or more sites; of a diff-SAE, its difference.
        crosscoder: trained on them.
        text: whole chats, unpacked, for KL over responses; else any text.
        latents: measures of the crosscoder, for halves by Delta-norm and by nu.
        extra: further sets of latents by name, each a variant of its own.
        kinds: which predicted tokens are measured; responses and the first 9 of each, or, of text
            without chats, all.
        compared: names of the sites, base first; the other way round patches what the base has
            into the base model.
        batch_size: contexts a forward pass.
        n_draws: bootstrap resamples of prompts.
        seed: of random latents and directions, and of the resamples.
        show_progress: with a progress bar.

    Raises:
        ValueError: a dictionary of other models, latents out of range, or prompts without tokens
            of the kind measured.
    """
    subject = Subject.of(models, crosscoder, compared=compared)
    kinds = kinds or kinds_of(text)
    chosen = candidates(subject, latents)
    variants = [
        *_whole(subject),
        *_of_candidates(subject, chosen.latents, latents),
        *_at_places(subject, kinds),
        *_random(subject, chosen.latents, latents, seed=seed),
        *(_patched(subject, ids, name=name, group="chosen") for name, ids in (extra or {}).items()),
    ]
    scores = score_edits(
        subject,
        text,
        [v.edit for v in variants],
        reference=unchanged(subject.finetuned),
        kinds=kinds,
        batch_size=batch_size,
        description="Patching" if show_progress else None,
    )
    names = subject.site_name(subject.base), subject.site_name(subject.finetuned)
    return PatchingResult(
        rows=tuple(_rows(variants, scores, list(kinds), n_draws=n_draws, seed=seed)),
        compared=names,
        candidates=chosen.how,
        candidate_latents=tuple(chosen.latents.tolist()),
    )


def candidates(subject: Subject, latents: LatentMeasures) -> Candidates:
    """Living latents that are finetuned-only, or, where they are few, lean most to the fine-tune.

    Of a diff-SAE, which has no decoder norms to compare: those that say most of the difference.
    """
    alive = latents.n_active >= MIN_ACTIVE_TOKENS
    n_least = max(2, min(LEAST, int(alive.sum())))
    name: LatentClass = "finetuned-only" if subject.base < subject.finetuned else "base-only"
    lean = latents.delta_norm if name == "finetuned-only" else 1 - latents.delta_norm
    if subject.is_of_difference:
        lean = _said_of_difference(subject, latents)
        n = max(n_least, round(SHARE * int(alive.sum())))
        how = f"the {n} latents that say most of the difference"
    else:
        of_class = alive & (latents.class_ids == LATENT_CLASSES.index(name))
        n = int(of_class.sum())
        how = f"the {n} {name} latents"
        if n < n_least:
            few = f"{n} {name} latents are too few: "
            n = max(n_least, round(SHARE * int(alive.sum())))
            how = f"{few}the {n} living ones with the most extreme Delta-norm"
    order = lean.masked_fill(~alive, -torch.inf).nan_to_num(-torch.inf).argsort(descending=True)
    return Candidates(latents=order[:n].to(subject.models.device), how=how)


def _said_of_difference(subject: Subject, latents: LatentMeasures) -> Float[Tensor, " d_sae"]:
    return latents.firing.sum_of_codes * subject.difference.norm(dim=1).cpu()


def _patched(subject: Subject, chosen: Sequence[int] | Tensor, *, name: str, group: str) -> Variant:
    """h_S."""
    ids = subject.latents(chosen)
    return Variant(
        name=name,
        group=group,
        n_latents=len(ids),
        edit=Shift(
            site=subject.finetuned,
            stream=subject.base,
            latents=ids,
            directions=subject.difference[ids],
        ),
    )


def _whole(subject: Subject) -> list[Variant]:
    """The whole dictionary: streams, all latents, reconstructions, errors."""
    site, base, d_sae = subject.finetuned, subject.base, subject.dictionary.cfg.d_sae
    every = _patched(subject, range(d_sae), name=EVERYTHING, group="dictionary")
    found = {
        BASE: Stream(site=site, stream=base),
        "errors and biases, no latents": Remainder(site=site, subject=subject),
    }
    if not subject.is_of_difference:
        parts = {"base": base, "fine-tuned": site}
        for name, own in parts.items():
            found[f"{name} reconstruction"] = Rebuilt(
                site=site, subject=subject, reconstruction=own
            )
        for name, own in parts.items():
            other = {"base": "fine-tuned", "fine-tuned": "base"}[name]
            found[f"{name} reconstruction, {other} error"] = Rebuilt(
                site=site, subject=subject, reconstruction=own, error=parts[other]
            )
    rest = [Variant(name=k, group="dictionary", edit=edit) for k, edit in found.items()]
    return [rest[0], every, *rest[1:]]


def _of_candidates(
    subject: Subject, chosen: Int[Tensor, " n"], latents: LatentMeasures
) -> list[Variant]:
    """Candidates, their halves by Delta-norm and by nu, and other ways to patch them."""
    found = [_patched(subject, chosen, name="candidates", group="candidates")]
    orders = {"Delta-norm": chosen, "nu": by_nu(subject, chosen, latents)}
    for name, order in orders.items():
        if order is None or len(order) < 2:
            continue
        half = len(order) // 2
        found += [
            _patched(subject, order[:half], name=f"top half by {name}", group="candidates"),
            _patched(subject, order[half:], name=f"bottom half by {name}", group="candidates"),
        ]
    site, rows = subject.finetuned, subject.decoder(subject.finetuned)[chosen]
    found.append(
        Variant(
            name="candidates, additive only",
            group="candidates",
            n_latents=len(chosen),
            edit=Shift(site=site, stream=subject.base, latents=chosen, directions=rows),
        )
    )
    found.append(
        Variant(
            name="fine-tuned stream without candidates",
            group="candidates",
            n_latents=len(chosen),
            edit=Projection(site=site, stream=site, directions=rows),
        )
    )
    return found


def by_nu(
    subject: Subject, chosen: Int[Tensor, " n"], latents: LatentMeasures
) -> Int[Tensor, " n"] | None:
    """Candidates by the sum of their ranks in |nu_error| and |nu_reconstruction|, lowest first."""
    direction = "finetuned" if subject.base < subject.finetuned else "base"
    scaling = latents.scaling.get(direction)
    if scaling is None:
        return None
    own = chosen.cpu()
    keys = nu_keys(scaling.nu_error.cpu()[own], scaling.nu_reconstruction.cpu()[own])
    order = keys.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
    return chosen[order.to(chosen.device)]


def _at_places(subject: Subject, kinds: Mapping[str, Places]) -> list[Variant]:
    """The fine-tuned stream itself at some tokens, and the base stream elsewhere."""
    site = subject.finetuned
    places = {"template": Places(roles=("template",)), **kinds}
    return [
        Variant(
            name=f"fine-tuned stream at {name} tokens",
            group="places",
            edit=Where(edit=unchanged(site), places=place, otherwise=subject.base),
        )
        for name, place in places.items()
    ]


def _random(
    subject: Subject, chosen: Int[Tensor, " n"], latents: LatentMeasures, *, seed: int
) -> list[Variant]:
    """As many living latents drawn at random, and random directions in the candidates' place."""
    generator = torch.Generator().manual_seed(seed)
    living = (latents.n_active >= MIN_ACTIVE_TOKENS).nonzero().squeeze(1)
    found = []
    for i in range(N_RANDOM):
        drawn = living[torch.randperm(len(living), generator=generator)[: len(chosen)]]
        found.append(_patched(subject, drawn, name=f"random latents {i}", group="random"))
    for i in range(N_RANDOM):
        directions = random_like(subject.difference[chosen], generator)
        edit = Shift(
            site=subject.finetuned, stream=subject.base, latents=chosen, directions=directions
        )
        found.append(
            Variant(
                name=f"candidates, random directions {i}",
                group="random",
                n_latents=len(chosen),
                edit=edit,
            )
        )
    return found


def random_like(
    rows: Float[Tensor, "n d_model"], generator: torch.Generator
) -> Float[Tensor, "n d_model"]:
    """Gaussian directions, each of the norm of its row."""
    noise = torch.randn(rows.shape, generator=generator).to(rows)
    return noise * (rows.norm(dim=1) / noise.norm(dim=1))[:, None]


def _rows(
    variants: Sequence[Variant],
    scores: EditScores,
    kinds: Sequence[str],
    *,
    n_draws: int,
    seed: int,
) -> list[PatchingRow]:
    n_prompts = scores.counts.shape[1]
    weights = bootstrap_weights(n_prompts, n_draws=n_draws, seed=seed)
    rows = []
    for k, kind in enumerate(kinds):
        counts, empty = scores.counts[k], scores.kl[0, k]
        for i, variant in enumerate(variants):
            own = scores.kl[i, k]
            kl = ratio_interval(own, counts, weights=weights)
            ce = ratio_interval(scores.ce[i, k], counts, weights=weights)
            share = interval(
                (1 - own.sum() / empty.sum()).item(), 1 - (weights @ own) / (weights @ empty)
            )
            rows.append(
                PatchingRow(
                    variant=variant.name,
                    group=variant.group,
                    tokens=kind,
                    n_latents=variant.n_latents,
                    n_tokens=int(counts.sum()),
                    n_prompts=n_prompts,
                    **{"kl": kl.value, "kl_low": kl.low, "kl_high": kl.high},
                    **{"ce": ce.value, "ce_low": ce.low, "ce_high": ce.high},
                    recovery=share.value,
                    recovery_low=share.low,
                    recovery_high=share.high,
                )
            )
    return rows
