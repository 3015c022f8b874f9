"""What a served page asks the models: `Live.answer`.

Contract: a question in, plain JSON out: what base, fine-tuned and edited model write greedily after
a prompt; for each token of what the fine-tuned one writes, how far the models' predictions are
apart (KL, nats); and which latents carry that, by `attribution` on these tokens. An edit ablates
latents in the fine-tuned model and steers it by one, both at once. Limit: one text is no measure of
a latent; what was not edited is kept for the last few prompts.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.config.settings import NaturalInt, Number, PositiveInt, Settings
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.attribution import attribution
from tl_crosscoder.interventions.attribution_goals import KLToFinetuned
from tl_crosscoder.interventions.edits import Edit, Together
from tl_crosscoder.interventions.latent_edits import ablation, steering
from tl_crosscoder.interventions.live import edited
from tl_crosscoder.interventions.running import kl_divergence
from tl_crosscoder.models.tokenizer import decode_continuation
from tl_crosscoder.notebook.model_diff import ModelDiff
from tl_crosscoder.notebook.prompts import codes_of, running_text
from tl_crosscoder.report.token_panels import text_tokens
from tl_crosscoder.run.causal import prompt_ids

N_LATENTS, LEAST_SHARE = 12, 0.005
"""Latents that are shown of a text at most, and the share of the change that each carries."""
N_KEPT = 8
"""Prompts whose unedited answer is kept."""
MOST_NEW_TOKENS = 200


@dataclass(frozen=True, kw_only=True)
class Ask(Settings):
    """What a page asks."""

    prompt: str
    """What a user says; plain text where the models have no chat template."""
    max_new_tokens: PositiveInt = 40
    without: tuple[NaturalInt, ...] = ()
    """Latents that are ablated in the fine-tuned model."""
    steered: NaturalInt | None = None
    """A latent by which a model is steered, along its fine-tuned decoder row."""
    strength: Number = 0.0
    """Of that, in units of the mean norm of the activation; 0 does not steer."""
    model: Literal["finetuned", "base"] = "finetuned"
    """The model that is steered; latents are ablated in the fine-tuned one alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.prompt.strip():
            raise ValueError("the prompt is empty: type what a user says.")
        if self.max_new_tokens > MOST_NEW_TOKENS:
            raise ValueError(
                f"max_new_tokens is {self.max_new_tokens}; a page asks for {MOST_NEW_TOKENS} at "
                "most."
            )
        if self.model == "base" and self.without:
            raise ValueError("latents are ablated in the fine-tuned model: steer the base alone.")


@dataclass(frozen=True, eq=False, kw_only=True)
class Live:
    """The models of a run, to be asked."""

    diff: ModelDiff
    _kept: "OrderedDict[tuple[str, int], dict[str, Any]]" = field(default_factory=OrderedDict)

    def answer(self, ask: Ask) -> dict[str, Any]:
        """Texts, tokens and latents, as plain JSON.

        Raises:
            ValueError: a prompt that is too long, or a latent that does not exist.
        """
        ids = prompt_ids(self.diff.run, ask.prompt)
        key = ask.prompt, ask.max_new_tokens
        if key not in self._kept:
            self._kept[key] = self._unedited(ids, ask.max_new_tokens)
            while len(self._kept) > N_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return {**self._kept[key], "edited": self._edited(ids, ask), "ask": vars(ask)}

    def _edited(self, ids: list[int], ask: Ask) -> str | None:
        """What the edited model writes; None where nothing is edited."""
        ctx = self.diff.ctx
        name = ctx.site_name(ctx.finetuned if ask.model == "finetuned" else ctx.base)
        edits: list[Edit] = []
        if ask.without:
            edits.append(ablation(ctx, list(ask.without)))
        if ask.steered is not None and ask.strength:
            how = {"strength": ask.strength, "norm": self.diff.norms[name], "site": name}
            edits.append(steering(ctx, ask.steered, **how))
        if not edits:
            return None
        edit = edits[0] if len(edits) == 1 else Together(site=edits[0].site, edits=tuple(edits))
        with edited(ctx, edit) as model:
            ((_, new),) = model.generate_tokens([ids], max_new_tokens=ask.max_new_tokens)
        return decode_continuation(ctx.models.tokenizer, ids, new)

    def _unedited(self, start: list[int], n_new: int) -> dict[str, Any]:
        ctx, run = self.diff.ctx, self.diff.run
        tokenizer = ctx.models.tokenizer
        (base, new) = (
            ctx.models.generate_tokens([start], site=ctx.site_name(i), max_new_tokens=n_new)[0][1]
            for i in (ctx.base, ctx.finetuned)
        )
        ids = [*start, *new]
        tokens, text = text_tokens(tokenizer, ids), running_text(run, ctx.models, ids)
        latents, note = self._latents(text, n_prompt=len(start))
        return {
            "base": decode_continuation(tokenizer, start, base),
            "finetuned": decode_continuation(tokenizer, start, new),
            "tokens": tokens,
            "n_prompt_tokens": len(start),
            "kl": self._kl(ids, n_prompt=len(start)),
            "latents": latents,
            "note": note,
        }

    @torch.no_grad()
    def _kl(self, ids: list[int], *, n_prompt: int) -> list[float]:
        """KL(fine-tuned || base), nats, of the prediction of each token after the prompt."""
        ctx, tokens = self.diff.ctx, torch.tensor([ids])
        base, finetuned = (
            self._log_probs(ctx.models.logits(tokens, site=ctx.site_name(i)), n_prompt)
            for i in (ctx.base, ctx.finetuned)
        )
        return [round(value, 5) for value in kl_divergence(finetuned, base).tolist()]

    def _log_probs(
        self, logits: Float[Tensor, "1 pos d_vocab"], n_prompt: int
    ) -> Float[Tensor, "n d_vocab"]:
        of_new = logits[0, n_prompt - 1 : -1, : self.diff.ctx.models.d_vocab]
        return of_new.float().log_softmax(dim=-1)

    def _latents(self, text: TokenizedText, *, n_prompt: int) -> tuple[list[dict[str, Any]], str]:
        """Latents by what they carry of the change on these tokens; and why there are none."""
        ctx, n_pos = self.diff.ctx, text.context_size
        every = torch.zeros(1, n_pos - 1, dtype=torch.bool)
        every[0, n_prompt - 1 :] = True
        if not bool(every.any()):
            return [], "The fine-tuned model writes nothing here."
        goal = KLToFinetuned(name="what it writes", text=text, every=every)
        try:
            found = attribution(ctx.models, self.diff.crosscoder, goal)
        except ValueError as error:
            return [], str(error)
        acts = ctx.acts(text.context_ids, text)
        assert acts.codes is not None
        carried, change = found.latents, found.change
        largest = carried.abs().topk(min(N_LATENTS, len(carried))).indices
        shown = largest[carried[largest].abs() > LEAST_SHARE * abs(change)].tolist()
        rows = [
            {
                "latent": j,
                "attribution": carried[j].item(),
                "share": carried[j].item() / change if change else None,
                "codes": [round(code, 4) for code in codes_of(acts.codes, j).tolist()],
            }
            for j in sorted(shown, key=lambda j: -carried[j].item())
        ]
        return rows, "" if rows else "No latent carries anything of the change on this text."
