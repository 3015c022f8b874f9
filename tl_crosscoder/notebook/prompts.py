"""What an edited model writes beside the models as they are: `diff.ablate([3]).generate("...")`.

Contract: an `EditedDiff` is a plan; a model has hooks only while it runs, and none after that,
whatever happens. Prompts are a user's turns where the tokenizer has a chat template, else plain
text. Limit: text in a notebook; with controls an effect is tested by `causal_test`.

One prompt read by both models: what each writes, and which latents explain the difference on it.

    explained_difference_j = sum_t (2 f_tj <v_j, delta_t> - f_tj^2 ||v_j||^2) / sum_t ||delta_t||^2

over the tokens t of the prompt and of what the fine-tuned model writes after it, with delta = x^1 -
x^0 and v_j = d_j^1 - d_j^0: the share of the squared difference that latent j explains alone, as
`DifferenceByLatent` has it for a whole text, there over its variance. Limit: a few tokens are no
measure of a latent, and what latents explain together counts for each.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.analysis.latents import in_order
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes, sampled_dots
from tl_crosscoder.data.documents import Document
from tl_crosscoder.data.tokens import TokenizedText, tokenize
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import Edit
from tl_crosscoder.interventions.live import EditedModel, edited
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.tokenizer import decode_continuation
from tl_crosscoder.report.circuits import TokensHtml
from tl_crosscoder.report.sections import samples_text
from tl_crosscoder.report.token_panels import colored_tokens_multi, text_tokens
from tl_crosscoder.report.tokens import edited_tokens
from tl_crosscoder.results.measures import spoken
from tl_crosscoder.results.render import Section, as_html, as_text
from tl_crosscoder.results.tables import TableOfRows
from tl_crosscoder.run.causal import (
    N_NEW_TOKENS,
    Prompt,
    prompt_ids,
    prompt_label,
    samples,
    several_prompts,
)
from tl_crosscoder.run.run import Run


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one model writes after one prompt."""

    prompt: str
    model: str
    """Name of the site, or `edited`."""
    text: str


@dataclass(frozen=True, kw_only=True)
class Generations(TableOfRows):
    """What several models write after the same prompts; a row each, shown side by side."""

    ROW: ClassVar[type] = Generation
    rows: tuple[Generation, ...]
    edit: str
    """What was done to the edited model; empty where none was."""

    @property
    def texts(self) -> dict[str, list[str]]:
        """Continuations by model, in the order of the prompts."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            found.setdefault(row.model, []).append(row.text)
        return found

    @property
    def prompts(self) -> list[str]:
        """The prompts, in order."""
        first = self.rows[0].model if self.rows else ""
        return [row.prompt for row in self.rows if row.model == first]

    def __str__(self) -> str:
        texts = self.texts.items()
        each = [
            (prompt, {model: own[i] for model, own in texts})
            for i, prompt in enumerate(self.prompts)
        ]
        return samples_text(each)

    def sections(self) -> list[Section]:
        """A row a prompt."""
        texts = {f"{spoken(name)} model": texts for name, texts in self.texts.items()}
        return [Section(title=self.edit, columns={"prompt": self.prompts, **texts})]


@dataclass(frozen=True, kw_only=True, eq=False)
class EditedDiff:
    """One of the models with an edit, whenever it runs."""

    run: Run
    ctx: InterventionContext
    edit: Edit
    name: str
    """What is done, in words."""

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int = N_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generations:
        """What base, fine-tuned and edited model write.

        Args:
            prompts: one or several: what a user says, or a list of messages that ends with it.
            max_new_tokens: at most so many each.
            temperature: 0 is greedy.
            seed: of sampling, the same for all three.

        Raises:
            ValueError: prompts that are longer than the models' context.
        """
        each = several_prompts(prompts)
        how = {"sites": (self.ctx.base, self.ctx.finetuned), "edits": {"edited": self.edit}}
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        found = samples(self.run, self.ctx, each, **how, **options)
        rows = [
            Generation(prompt=prompt, model=model, text=text)
            for prompt, texts in found
            for model, text in texts.items()
        ]
        return Generations(rows=tuple(rows), edit=self.name)

    def log_probs(self, text: str | Document) -> TokensHtml:
        """Log-probability of each token of a text before and after the edit."""
        return edited_tokens(self.ctx.models, text, self.open())

    def open(self) -> AbstractContextManager[EditedModel]:
        """The edited model, while the context is open: `with diff.ablate([3]).open() as model:`."""
        return edited(self.ctx, self.edit)

    def __repr__(self) -> str:
        return f"EditedDiff({self.name}; .generate(prompts), .log_probs(text), .open())"


@dataclass(frozen=True, kw_only=True)
class PromptLatent:
    """A latent on these tokens."""

    latent: int
    explained_difference: float
    """Share of the squared norm of the difference on these tokens that it explains alone."""
    max_code: float
    token: str
    """Where its code is largest; empty where it is active nowhere."""
    n_active: int
    """Tokens here on which it is active."""
    relative_decoder_norm: float
    latent_class: str
    codes: tuple[float, ...]
    """At each token; 0 at those that do not count."""


@dataclass(frozen=True, kw_only=True)
class PromptDiff(TableOfRows):
    """Latents by the difference that they explain on a prompt, most first."""

    ROW: ClassVar[type] = PromptLatent
    rows: tuple[PromptLatent, ...]
    prompt: str
    base: str
    """What the base model writes, greedily."""
    finetuned: str
    """What the fine-tuned one does."""
    tokens: tuple[str, ...]
    """Tokens of the prompt, template included, and of what the fine-tuned model writes."""
    n_prompt_tokens: int

    @property
    def latents(self) -> list[int]:
        """Their numbers."""
        return [row.latent for row in self.rows]

    def panel(self) -> TokensHtml:
        """The codes over the tokens, a latent at a time. Raises ValueError without a latent."""
        codes = torch.tensor([row.codes for row in self.rows]).T
        labels = [f"latent {row.latent}" for row in self.rows]
        return TokensHtml(panels=(colored_tokens_multi(self.tokens, codes, labels),))

    def __str__(self) -> str:
        samples = samples_text([(self.prompt, {"base": self.base, "finetuned": self.finetuned})])
        return f"{samples}\n\n{as_text(self.sections(), is_whole=True)}"

    def sections(self) -> list[Section]:
        """The latents, a row each."""
        columns = {name: values for name, values in self.columns().items() if name != "codes"}
        return [Section(title="Latents by the difference that they explain here", columns=columns)]

    def _repr_html_(self) -> str:
        texts = {"prompt": [self.prompt]}
        texts |= {"base model": [self.base], "fine-tuned model": [self.finetuned]}
        note = f"{self.n_prompt_tokens} tokens of the prompt, then what the fine-tuned model writes"
        shown = as_html([Section(columns=texts), *self.sections(), Section(notes=[note])])
        return shown + (self.panel()._repr_html_() if self.rows else "")


def prompt_diff(
    run: Run,
    ctx: InterventionContext,
    prompt: Prompt,
    *,
    latents: Sequence[int] | None = None,
    n: int = 8,
    max_new_tokens: int = N_NEW_TOKENS,
) -> PromptDiff:
    """Let both models write on, and encode the prompt with what the fine-tuned one wrote.

    Args:
        run: where measures of the latents are.
        ctx: its models and dictionary.
        prompt: a user's turn where there is a chat template, else plain text; or a list of
            messages that ends with a user's.
        latents: which to show, in this order; None is the n that explain most of the difference.
        n: how many at most; only active ones are among them.
        max_new_tokens: that each model writes, at most.

    Raises:
        ValueError: a latent out of range, or a prompt that is too long.
    """
    chosen = None if latents is None else ctx.latents(latents).tolist()
    start = prompt_ids(run, prompt)
    ((_, base),), ((_, new),) = (
        ctx.models.generate_tokens([start], site=ctx.site_name(i), max_new_tokens=max_new_tokens)
        for i in (ctx.base, ctx.finetuned)
    )
    ids, tokenizer = [*start, *new], ctx.models.tokenizer
    text = running_text(run, ctx.models, ids)
    acts = ctx.acts(text.context_ids, text)
    assert acts.codes is not None
    explained = _explained(ctx, acts, acts.codes)
    if chosen is None:
        active = acts.codes.fired().cpu().nonzero().squeeze(1)
        chosen = active[explained[active].argsort(descending=True)[:n]].tolist()
    tokens = text_tokens(tokenizer, ids)
    return PromptDiff(
        rows=tuple(_row(run, j, explained[j].item(), acts.codes, tokens) for j in chosen),
        prompt=prompt_label(prompt),
        base=decode_continuation(tokenizer, start, base),
        finetuned=decode_continuation(tokenizer, start, new),
        tokens=tuple(tokens),
        n_prompt_tokens=len(start),
    )


def running_text(run: Run, models: ModelPair, ids: list[int]) -> TokenizedText:
    """Ids as one context, with the masks of the run."""
    how = {"context_size": len(ids), "pack": False, "masks": run.masks}
    text = tokenize([{"input_ids": ids}], models.tokenizer, **how)
    limits = run.record["held_out"].get("norm_limits")
    return replace(text, norm_limits=None if limits is None else tuple(limits))


def _explained(
    ctx: InterventionContext, acts: SiteActivations, codes: SparseCodes
) -> Float[Tensor, " d_sae"]:
    """See the module; NaN where the models are equal."""
    pattern, f = codes.pattern, codes.values.double()
    x = [acts.x[i].flatten(0, 1).double() for i in (ctx.base, ctx.finetuned)]
    delta, v = x[1] - x[0], ctx.difference.double()
    latents = pattern.latents.long()
    squares = v.square().sum(dim=1)[latents]
    dots = sampled_dots(delta, v, pattern.offsets, pattern.latents)
    gain = torch.bincount(latents, weights=2 * f * dots - f.square() * squares,
                          minlength=pattern.d_sae)  # fmt: skip
    total = delta[acts.counted.flatten()].square().sum()
    return (gain / torch.where(total > 0, total, torch.nan)).cpu()


def codes_of(codes: SparseCodes, latent: int) -> Float[Tensor, " pos"]:
    """One latent's code at each token, on the CPU."""
    own, is_own = torch.zeros(codes.batch), codes.pattern.latents == latent
    own[codes.pattern.tokens[is_own].long().cpu()] = codes.values[is_own].float().cpu()
    return own


def _row(
    run: Run,
    latent: int,
    explained: float,
    codes: SparseCodes,
    tokens: list[str],
) -> PromptLatent:
    (measured,) = in_order(run.measurement().latents, [latent], order="chosen").rows
    own = codes_of(codes, latent)
    return PromptLatent(
        latent=latent,
        explained_difference=explained,
        max_code=own.max().item(),
        token=tokens[int(own.argmax())] if own.any() else "",
        n_active=int((own > 0).sum()),
        relative_decoder_norm=measured.relative_decoder_norm,
        latent_class=measured.latent_class,
        codes=tuple(own.tolist()),
    )
