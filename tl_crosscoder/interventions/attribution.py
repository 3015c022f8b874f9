"""Attribution: which latents carry the change from base to fine-tuned model, and how much of it.

The fine-tuned model goes on from h at the hook; F(h) is KL(p_finetuned || p_h), summed over chosen
predictions, or log B(h), the log-probability of a behaviour. With v_j = d_j^1 - d_j^0 and

    G_t = 1/n sum_s dF/dh_t        at h = x^0 + (s - 1/2)/n (x^1 - x^0), s = 1 ... n

(integrated gradients, Sundararajan et al. 2017, arXiv 1703.01365) a latent carries, at a token,

    A_jt = -f_jt <v_j, G_t>        the error -<e^1 - e^0, G_t>, the bias -<b^1 - b^0, G_t>

of KL, with the other sign of log B. Contract: raw activations, as those that a folded dictionary
is for; over a text all terms add up to F(x^0) - F(x^1), up to the quadrature. Tokens without codes
(BOS, first positions) are a term of their own. Batches stream; what is kept is `[n_roles, d_sae]`
and the latents of each passage. Cost: n forward and backward passes above the hook, one forward
pass of each end, and the layers below. Limit: gradients have to pass the layers above the hook.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.config.causal import AttributionSettings
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.sparse.codes import sampled_dots
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.attribution_goals import Goal, goal_of
from tl_crosscoder.interventions.attribution_result import TERMS, Attribution, measured_text
from tl_crosscoder.interventions.behaviour import Effect
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.passages import passages_of, sentence_ends
from tl_crosscoder.interventions.running import MAX_LOGITS, log_probs_at
from tl_crosscoder.mesh import ALONE, Axis
from tl_crosscoder.models.forward import (
    activation_gradients,
    continued,
    differentiable,
    ends_a_block,
)
from tl_crosscoder.models.pair import ModelPair


def attribution(
    models: ModelPair,
    crosscoder: Crosscoder,
    effect: Effect | Goal,
    *,
    settings: AttributionSettings | None = None,
    batch_size: int = 16,
    keep_tokens: bool = False,
    part: str = "given",
    show_progress: bool = False,
    axis: Axis = ALONE,
) -> Attribution:
    """Share the change out over latents, the dictionary's error and its bias.

    Args:
        models: a pair, or more sites; of a diff-SAE, its difference. `comparing` swaps them.
        crosscoder: trained on them, for raw activations.
        effect: `Predictions`, whose KL to the fine-tuned model is shared out, or a `Behaviour`,
            whose log-probability is, summed over its prompts; or a `Goal` of your own.
        settings: where gradients are taken.
        batch_size: contexts at a time; fewer where their logits take more than `MAX_LOGITS`.
        keep_tokens: keep the sums of each token.
        part: what is recorded of where the text is from.
        show_progress: with a progress bar.
        axis: processes that share the contexts out; all find the same.

    Raises:
        ValueError: a dictionary of other models, nothing to predict, fewer contexts than processes,
            or models whose layers above the hook pass no gradient.
    """
    settings = settings or AttributionSettings()
    n, goal = settings.n_steps, effect if isinstance(effect, Goal) else goal_of(effect)
    ctx, text = InterventionContext.of(models, crosscoder), goal.text
    times = [0.0] if settings.at_base else [(s + 0.5) / n for s in range(n)]
    path = _Path(ctx=ctx, goal=goal, times=times, axis=axis)
    size = max(1, min(batch_size, MAX_LOGITS // (text.context_size * ctx.models.d_vocab)))
    with differentiable(path.model):
        sums = _Sums(ctx, text, sign=goal.sign, keep_tokens=keep_tokens)
        if goal.needs_weights:
            goal.weigh(path.everywhere(size))
        description = "Attributing" if show_progress else None
        for acts in ctx.batches(text, batch_size=size, description=description, axis=axis):
            reference, ends = path.ends(acts)
            sums.add(acts, path.gradient(acts, reference), ends, predicted=goal.mask(acts))
        sums.gather(axis)
        start, end = goal.totals(sums.ends).tolist()
        return sums.result(
            effect=goal.name,
            unit=goal.unit,
            compared=ctx.models.compared_names,
            hook_name=path.hook_name,
            n_steps=n,
            at_base=settings.at_base,
            start=start,
            end=end,
            text=measured_text(text, n_predicted=goal.n_predicted, part=part),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Path:
    """From the base's activation to the fine-tuned one, and the model that goes on from there."""

    ctx: InterventionContext
    goal: Goal
    times: Sequence[float]
    """Points at which gradients are taken: 0 is x^0, 1 would be x^1."""
    axis: Axis

    @property
    def model(self) -> Any:
        """The fine-tuned model."""
        return self.ctx.models.models[self.ctx.finetuned]

    @property
    def hook_name(self) -> str:
        """Where it goes on."""
        return self.ctx.models.model_sites[self.ctx.finetuned].hook_name

    def at(
        self, acts: SiteActivations, times: Sequence[float]
    ) -> Float[Tensor, "n batch pos d_model"]:
        """Activations on the way, float32."""
        base, finetuned = acts.x[self.ctx.base], acts.x[self.ctx.finetuned]
        return torch.stack([finetuned if t == 1 else base + t * (finetuned - base) for t in times])

    def log_probs(
        self, logits: Float[Tensor, "n batch pos d_vocab"], acts: SiteActivations
    ) -> list[Float[Tensor, "n_predicted d_vocab"]]:
        """Log-probabilities of each variant where predictions count."""
        mask, d_vocab = self.goal.mask(acts), self.ctx.models.d_vocab
        return [log_probs_at(each[..., :d_vocab], mask) for each in logits]

    def _continued(
        self, variants: Float[Tensor, "n batch pos d_model"], acts: SiteActivations
    ) -> Float[Tensor, "n batch pos d_vocab"]:
        return continued(self.model, self.hook_name, acts.text.tokens.long(), variants=variants)

    @torch.no_grad()
    def ends(
        self, acts: SiteActivations
    ) -> tuple[Float[Tensor, "n_predicted d_vocab"], Float[Tensor, "2 batch"]]:
        """What the fine-tuned model predicts as it is, and the goal at x^0 and x^1."""
        start, end = self.log_probs(self._continued(self.at(acts, [0.0, 1.0]), acts), acts)
        values = [self.goal.of_contexts(log_q, acts, end) for log_q in (start, end)]
        return end, torch.stack(values)

    @torch.no_grad()
    def everywhere(self, batch_size: int) -> Float[Tensor, "n_times n_contexts"]:
        """The goal of every context at the points where gradients are taken."""
        text = self.goal.text
        found = torch.zeros(len(self.times), len(text), dtype=torch.float64)
        for acts in self.ctx.batches(text, batch_size=batch_size, axis=self.axis):
            for i, t in enumerate(self.times):
                (log_q,) = self.log_probs(self._continued(self.at(acts, [t]), acts), acts)
                found[i, acts.index] = self.goal.of_contexts(log_q, acts, log_q).cpu()
        return self.axis.reduced(found)

    def gradient(
        self, acts: SiteActivations, reference: Float[Tensor, "n_predicted d_vocab"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """G: the mean of the gradient over the points, zero in contexts that do not move."""
        tokens, n = acts.text.tokens.long(), len(self.times)
        room = MAX_LOGITS // (tokens.numel() * self.ctx.models.d_vocab)
        room = max(1, room) if ends_a_block(self.hook_name) else 1
        total = torch.zeros_like(acts.x[self.ctx.base])
        for start in range(0, n, room):
            steps = range(n)[start : start + room]

            def value(
                logits: Float[Tensor, "n batch pos d_vocab"], steps: range = steps
            ) -> Float[Tensor, ""]:
                each = zip(steps, self.log_probs(logits, acts), strict=True)
                return torch.stack(
                    [self.goal.weighted(log_q, acts, reference, step=s) for s, log_q in each]
                ).sum()

            variants = self.at(acts, [self.times[s] for s in steps])
            total += activation_gradients(
                self.model, self.hook_name, tokens, variants=variants, value=value
            ).sum(dim=0)
        # Where both activations are equal the way has no length: without this, rounding would
        # leave latents with parts that cancel.
        delta = acts.x[self.ctx.finetuned] - acts.x[self.ctx.base]
        moves = (delta != 0).flatten(1).any(dim=1)
        return torch.where(moves[:, None, None], total / n, 0.0)


class _Sums:
    """What is kept of a text while batches pass."""

    def __init__(
        self, ctx: InterventionContext, text: TokenizedText, *, sign: float, keep_tokens: bool
    ) -> None:
        n, d_sae = len(text), ctx.dictionary.cfg.d_sae
        self._ctx, self._sign = ctx, sign
        self._ends_sentence = sentence_ends(text.tokens, ctx.models.tokenizer)
        self.ends = torch.zeros(2, n, dtype=torch.float64)
        """The goal of each context at both ends."""
        self._by_role = torch.zeros(len(ROLES) * d_sae, dtype=torch.float64)
        self._terms = torch.zeros(len(TERMS), n, dtype=torch.float64)
        self._tokens = torch.zeros(text.tokens.shape) if keep_tokens else None
        self._spans: list[Tensor] = []
        """Passages, by batch."""
        self._entries: list[tuple[Tensor, Tensor, Tensor]] = []
        """Passage, counted over batches, latent and nats."""

    @torch.no_grad()
    def add(
        self,
        acts: SiteActivations,
        gradient: Float[Tensor, "batch pos d_model"],
        ends: Float[Tensor, "2 batch"],
        *,
        predicted: Bool[Tensor, "batch pos_less_one"],
    ) -> None:
        """Take some contexts into account."""
        assert acts.codes is not None
        ctx, codes, pattern, index = self._ctx, acts.codes, acts.codes.pattern, acts.index
        self.ends[:, index] = ends.double().cpu()
        G = self._sign * gradient
        v, shape = ctx.difference.to(G), acts.text.tokens.shape
        dots = sampled_dots(G.flatten(0, 1), v, pattern.offsets, pattern.latents)
        each = codes.values.double() * dots.double()
        rows, latents = pattern.tokens.long(), pattern.latents.long()
        places = acts.text.role_ids.flatten().long().to(rows.device)[rows] * len(v) + latents
        self._by_role += torch.bincount(
            places, weights=each, minlength=len(self._by_role)
        ).cpu()  # fmt: skip
        by_token = torch.bincount(rows, weights=each, minlength=shape.numel()).view(shape)
        self._terms[:, index] = self._terms_of(acts, G, by_token).sum(dim=-1).cpu()
        if self._tokens is not None:
            self._tokens[index, : shape[1]] = by_token.float().cpu()
        passages = passages_of(predicted.cpu(), self._ends_sentence[index, : shape[1]])
        n_before = sum(map(len, self._spans))
        spans = passages.spans.clone()
        spans[:, 0] = index[spans[:, 0]]
        self._spans.append(spans)
        own = passages.numbers.flatten().to(rows.device)[rows]
        keys, inverse = (own * len(v) + latents).unique(return_inverse=True)
        values = torch.bincount(inverse, weights=each, minlength=len(keys)).float().cpu()
        keys = keys.cpu()
        self._entries.append((n_before + keys // len(v), (keys % len(v)).int(), values))

    def gather(self, axis: Axis) -> None:
        """Put together what several processes found of their contexts."""
        if axis.size == 1:
            return
        self.ends, self._by_role, self._terms = map(
            axis.reduced, (self.ends, self._by_role, self._terms)
        )
        self._tokens = None if self._tokens is None else axis.reduced(self._tokens)
        spans, entries = self._found()
        n_before = axis.gathered(torch.tensor([len(spans)]))[: axis.index].sum()
        self._spans = [axis.gathered(spans)]
        passages, latents, values = entries
        self._entries = [
            (axis.gathered(passages + n_before), axis.gathered(latents), axis.gathered(values))
        ]

    def _found(self) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """All passages, and the entries of all."""
        passages, latents, values = (torch.cat(each) for each in zip(*self._entries, strict=True))
        return torch.cat(self._spans), (passages, latents, values)

    def _terms_of(
        self,
        acts: SiteActivations,
        G: Float[Tensor, "batch pos d_model"],
        by_token: Float[Tensor, "batch pos"],
    ) -> Float[Tensor, "n_terms batch pos"]:
        """Each of `TERMS` at each token; the error is what the others leave of x^1 - x^0."""
        ctx, counted = self._ctx, acts.counted
        delta = acts.x[ctx.finetuned] - acts.x[ctx.base]
        whole = (delta.double() * G.double()).sum(dim=-1)
        bias = torch.where(counted, G.double() @ ctx.bias_difference.double(), 0.0)
        error = torch.where(counted, whole - by_token - bias, 0.0)
        return torch.stack([by_token, error, bias, torch.where(counted, 0.0, whole)])

    def result(self, **facts: Any) -> Attribution:
        """The sums as a result, passages in the order of the text."""
        spans, (passages, latents, values) = self._found()
        in_text = spans[:, 0].sort(stable=True).indices
        places = in_text.argsort()[passages]
        order = places.sort(stable=True).indices
        counts = torch.bincount(places, minlength=len(spans))
        return Attribution(
            by_role=self._by_role.view(len(ROLES), -1),
            spans=spans[in_text],
            offsets=torch.cat([counts.new_zeros(1), counts.cumsum(dim=0)]),
            passage_latents=latents[order],
            passage_values=values[order],
            terms=self._terms,
            tokens=self._tokens,
            **facts,
        )
