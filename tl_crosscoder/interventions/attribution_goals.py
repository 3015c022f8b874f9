"""Goals: the number that attribution shares out, differentiable in the logits.

Contract: a number for each prediction that counts, float32, summed by context and over the text;
`sign` times its change from x^0 to x^1 is what latents carry. `Predictions` give KL to the
fine-tuned model, a `Behaviour` log B. Limit: predictions on given text.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.attribution_result import KL_UNIT
from tl_crosscoder.interventions.behaviour import Behaviour, Effect, Predictions
from tl_crosscoder.interventions.context import SiteActivations
from tl_crosscoder.interventions.running import kl_divergence, predicted


class Goal(ABC):
    """Abstract: a number of each context."""

    name: str
    """What tables call it."""
    unit: str
    sign: float
    """1 where the change is end minus start."""
    text: TokenizedText
    needs_weights = False
    """Whether `weigh` has to be told the goal of every context before gradients are taken."""

    @abstractmethod
    def mask(self, acts: SiteActivations) -> Bool[Tensor, "batch pos_less_one"]:
        """Positions whose predictions count."""

    @abstractmethod
    def values(
        self,
        log_q: Float[Tensor, "n d_vocab"],
        acts: SiteActivations,
        reference: Float[Tensor, "n d_vocab"],
    ) -> Float[Tensor, " n"]:
        """The number of each prediction that counts; the fine-tuned model's is the reference."""

    @property
    @abstractmethod
    def n_predicted(self) -> int:
        """Predictions that count, in the whole text."""

    def of_contexts(
        self,
        log_q: Float[Tensor, "n d_vocab"],
        acts: SiteActivations,
        reference: Float[Tensor, "n d_vocab"],
    ) -> Float[Tensor, " batch"]:
        """Sums by context, float64."""
        values = self.values(log_q, acts, reference).double()
        contexts = self.mask(acts).nonzero()[:, 0].to(values.device)
        return values.new_zeros(len(acts.index)).index_add(0, contexts, values)

    def weighted(
        self,
        log_q: Float[Tensor, "n d_vocab"],
        acts: SiteActivations,
        reference: Float[Tensor, "n d_vocab"],
        *,
        step: int,  # noqa: ARG002
    ) -> Float[Tensor, ""]:
        """Sum over contexts, whose gradient is that of the goal at a step of the way."""
        return self.of_contexts(log_q, acts, reference).sum()

    def totals(self, ends: Float[Tensor, "n n_contexts"]) -> Float[Tensor, " n"]:
        """The goal over the text, from the numbers of its contexts."""
        return ends.sum(dim=1)

    def weigh(self, everywhere: Float[Tensor, "n_steps n_contexts"]) -> None:  # noqa: B027
        """Learn the goal of every context at every step."""


@dataclass(eq=False, kw_only=True)
class KLToFinetuned(Goal):
    """KL(p_finetuned || p_h), summed over the predictions of one kind of token."""

    name: str
    text: TokenizedText
    every: Bool[Tensor, "contexts pos_less_one"]
    unit: str = KL_UNIT
    sign: float = -1.0

    def mask(self, acts: SiteActivations) -> Bool[Tensor, "batch pos_less_one"]:
        """Where the kind of token follows."""
        return self.every[acts.index, : acts.text.tokens.shape[1] - 1]

    def values(
        self,
        log_q: Float[Tensor, "n d_vocab"],
        acts: SiteActivations,  # noqa: ARG002
        reference: Float[Tensor, "n d_vocab"],
    ) -> Float[Tensor, " n"]:
        """KL, nats."""
        return kl_divergence(reference, log_q)

    @property
    def n_predicted(self) -> int:
        """Number of such tokens that follow another."""
        return int(self.every.sum())


@dataclass(eq=False, kw_only=True)
class LogBehaviour(Goal):
    """log B, summed over prompts; B is a sum over answers, each a context of its own.

    Its gradient is that of each answer's log P, weighted by the answer's share of B there.
    """

    behaviour: Behaviour
    unit: str = "log-probability, nats"
    sign: float = 1.0
    _shares: Float[Tensor, "n_steps n_contexts"] | None = None

    @property
    def name(self) -> str:  # type: ignore[override]
        """Name of the behaviour."""
        return self.behaviour.name

    @property
    def text(self) -> TokenizedText:  # type: ignore[override]
        """A context for each prompt with each of its answers."""
        return self.behaviour.text

    @property
    def needs_weights(self) -> bool:
        """Whether a prompt has several answers."""
        return len(self.text) > self.behaviour.n_prompts

    def mask(self, acts: SiteActivations) -> Bool[Tensor, "batch pos_less_one"]:
        """Where a token of the answer follows."""
        return self.behaviour.answers(acts.index, n_pos=acts.text.tokens.shape[1])

    def values(
        self,
        log_q: Float[Tensor, "n d_vocab"],
        acts: SiteActivations,
        reference: Float[Tensor, "n d_vocab"],  # noqa: ARG002
    ) -> Float[Tensor, " n"]:
        """Log-probability of the token that follows."""
        targets = acts.text.tokens[:, 1:][self.mask(acts)].long().to(log_q.device)
        return log_q.gather(-1, targets[:, None]).squeeze(-1)

    @property
    def n_predicted(self) -> int:
        """Tokens of all answers."""
        every = torch.arange(len(self.text))
        return int(self.behaviour.answers(every, n_pos=self.text.context_size).sum())

    def weighted(
        self,
        log_q: Float[Tensor, "n d_vocab"],
        acts: SiteActivations,
        reference: Float[Tensor, "n d_vocab"],
        *,
        step: int,
    ) -> Float[Tensor, ""]:
        """Sum of log P over answers, each times its share of B."""
        log_probs = self.of_contexts(log_q, acts, reference)
        if self._shares is not None:
            log_probs = log_probs * self._shares[step, acts.index].to(log_probs)
        return log_probs.sum()

    def weigh(self, everywhere: Float[Tensor, "n_steps n_contexts"]) -> None:
        """Learn each answer's share of B."""
        prompts = torch.tensor(self.behaviour.prompt_of)
        self._shares = (everywhere - self._log_sums(everywhere)[:, prompts]).exp()

    def totals(self, ends: Float[Tensor, "n n_contexts"]) -> Float[Tensor, " n"]:
        """The sum of log B over prompts."""
        return self._log_sums(ends).sum(dim=1)

    def _log_sums(self, log_probs: Float[Tensor, "n n_contexts"]) -> Float[Tensor, "n n_prompts"]:
        """The log of the sum over the answers of each prompt."""
        prompts = torch.tensor(self.behaviour.prompt_of).expand_as(log_probs)
        most = log_probs.new_full((len(log_probs), self.behaviour.n_prompts), -torch.inf)
        most = most.scatter_reduce(1, prompts, log_probs, reduce="amax")
        scaled = (log_probs - most.gather(1, prompts)).exp()
        return most + torch.zeros_like(most).scatter_add(1, prompts, scaled).log()


def goal_of(effect: Effect) -> Goal:
    """The goal of an effect. Raises ValueError where nothing is predicted, or there is none."""
    if isinstance(effect, Behaviour):
        return LogBehaviour(behaviour=effect)
    if not isinstance(effect, Predictions):
        raise ValueError(
            f"{type(effect).__name__} {effect.name!r} has no gradient: give Predictions or a "
            "Behaviour."
        )
    every = predicted(effect.places, effect.text)
    if not bool(every.any()):
        raise ValueError(
            f"none of the {len(effect.text)} contexts has a token of the kind {effect.kind!r} to "
            "predict. Give whole chats that end with an assistant's message, for responses, and "
            "contexts of two tokens or more."
        )
    return KLToFinetuned(name=effect.name, text=effect.text, every=every)
