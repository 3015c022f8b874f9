"""One prompt seen by both models: what each writes, and which latents speak on it.

    said_j = sum_t (2 f_tj <v_j, delta_t> - f_tj^2 ||v_j||^2) / sum_t ||delta_t||^2

over the tokens t of the prompt and of what the fine-tuned model writes after it, with delta = x^1 -
x^0 and v_j = d_j^1 - d_j^0: how much less is left of the difference if only latent j speaks, as
`DifferenceByLatent` has it for a whole text, there over its variance. Limit: a few tokens are no
measure of a latent; what its neighbours say as well counts for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.activations.text import tokenize
from tl_crosscoder.analysis.ranking import in_order
from tl_crosscoder.causal import prompt_ids
from tl_crosscoder.crosscoder.codes import SparseCodes
from tl_crosscoder.crosscoder.kernels import sampled_dots
from tl_crosscoder.html_tables import box, heading, note, table
from tl_crosscoder.interventions.subject import Streams, Subject
from tl_crosscoder.live.edited_diff import N_NEW_TOKENS
from tl_crosscoder.run_folder import RunFolder
from tl_crosscoder.tables import Columns, TableOfRows
from tl_crosscoder.text_tables import table_text
from tl_crosscoder.tokenization import decode_continuation
from tl_crosscoder.visualize.causal_tables import samples_table
from tl_crosscoder.visualize.circuits_html import TokensHtml
from tl_crosscoder.visualize.token_names import text_tokens
from tl_crosscoder.visualize.token_panels import colored_tokens_multi


@dataclass(frozen=True, kw_only=True)
class PromptLatent:
    """A latent on these tokens."""

    latent: int
    said: float
    """Share of the squared norm of the difference on these tokens that goes if only it speaks."""
    max_code: float
    token: str
    """Where its code is largest; empty where it is silent."""
    n_active: int
    """Of these tokens."""
    relative_decoder_norm: float
    latent_class: str
    codes: tuple[float, ...]
    """At each token; 0 at those that do not count."""


@dataclass(frozen=True, kw_only=True)
class PromptDiff(TableOfRows):
    """Latents by what they say of the difference on a prompt, most first."""

    ROW: ClassVar[type] = PromptLatent
    rows: tuple[PromptLatent, ...]
    prompt: str
    base: str
    """What the base model writes, greedily."""
    finetuned: str
    """What the fine-tuned one does."""
    tokens: tuple[str, ...]
    """Of the prompt, template included, and of what the fine-tuned model writes."""
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
        samples = samples_table([(self.prompt, {"base": self.base, "finetuned": self.finetuned})])
        said = "Latents by what they say of the difference here"
        return "\n".join([samples, "", said, table_text(self._columns(), n_rows=None)])

    def _repr_html_(self) -> str:
        texts = {"prompt": [self.prompt]}
        texts |= {"base model": [self.base], "fine-tuned model": [self.finetuned]}
        parts = [
            table(texts),
            heading("Latents by what they say of the difference here"),
            table(self._columns()),
            note(f"{self.n_prompt_tokens} tokens of the prompt, then what the fine-tune writes"),
        ]
        return box(*parts) + (self.panel()._repr_html_() if self.rows else "")

    def _columns(self) -> Columns:
        return {name: values for name, values in self.columns().items() if name != "codes"}


def prompt_diff(
    run: RunFolder,
    subject: Subject,
    prompt: str,
    *,
    latents: Sequence[int] | None = None,
    n: int = 8,
    max_new_tokens: int = N_NEW_TOKENS,
) -> PromptDiff:
    """Let both models write on, and encode the prompt with what the fine-tuned one wrote.

    Args:
        run: where measures of the latents are.
        subject: its models and dictionary.
        prompt: a user's turn where there is a chat template, else plain text.
        latents: which to show, in this order; None is the n that say most of the difference.
        n: how many at most; those that are silent are never among them.
        max_new_tokens: that each model writes, at most.

    Raises:
        ValueError: a latent out of range, or a prompt that is too long.
    """
    chosen = None if latents is None else subject.latents(latents).tolist()
    start = prompt_ids(run, prompt)
    ((_, base),), ((_, new),) = (
        subject.models.generate_tokens(
            [start], site=subject.site_name(i), max_new_tokens=max_new_tokens
        )
        for i in (subject.base, subject.finetuned)
    )
    ids, tokenizer = [*start, *new], subject.models.tokenizer
    streams = _streams(run, subject, ids)
    assert streams.codes is not None
    said = _said(subject, streams, streams.codes)
    if chosen is None:
        speaking = streams.codes.fired().cpu().nonzero().squeeze(1)
        chosen = speaking[said[speaking].argsort(descending=True)[:n]].tolist()
    tokens = text_tokens(tokenizer, ids)
    return PromptDiff(
        rows=tuple(_row(run, j, said, streams.codes, tokens) for j in chosen),
        prompt=prompt,
        base=decode_continuation(tokenizer, start, base),
        finetuned=decode_continuation(tokenizer, start, new),
        tokens=tuple(tokens),
        n_prompt_tokens=len(start),
    )


def _streams(run: RunFolder, subject: Subject, ids: list[int]) -> Streams:
    how = {"context_size": len(ids), "pack": False, "masks": run.masks}
    text = tokenize([{"input_ids": ids}], subject.models.tokenizer, **how)
    limits = run.record["held_out"].get("norm_limits")
    text = replace(text, norm_limits=None if limits is None else tuple(limits))
    return subject.streams(text.context_ids, text)


def _said(subject: Subject, streams: Streams, codes: SparseCodes) -> Float[Tensor, " d_sae"]:
    """See the module; NaN where the models are equal."""
    pattern, f = codes.pattern, codes.values.double()
    x = [streams.x[i].flatten(0, 1).double() for i in (subject.base, subject.finetuned)]
    delta, v = x[1] - x[0], subject.difference.double()
    latents = pattern.latents.long()
    squares = v.square().sum(dim=1)[latents]
    dots = sampled_dots(delta, v, pattern.offsets, pattern.latents)
    gain = torch.bincount(latents, weights=2 * f * dots - f.square() * squares,
                          minlength=pattern.d_sae)  # fmt: skip
    total = delta[streams.counted.flatten()].square().sum()
    return (gain / torch.where(total > 0, total, torch.nan)).cpu()


def _row(
    run: RunFolder,
    latent: int,
    said: Float[Tensor, " d_sae"],
    codes: SparseCodes,
    tokens: list[str],
) -> PromptLatent:
    (measured,) = in_order(run.measurement().latents, [latent], order="chosen").rows
    own, is_own = torch.zeros(codes.batch), codes.pattern.latents == latent
    own[codes.pattern.tokens[is_own].long().cpu()] = codes.values[is_own].float().cpu()
    return PromptLatent(
        latent=latent,
        said=said[latent].item(),
        max_code=own.max().item(),
        token=tokens[int(own.argmax())] if own.any() else "",
        n_active=int((own > 0).sum()),
        relative_decoder_norm=measured.relative_decoder_norm,
        latent_class=measured.latent_class,
        codes=tuple(own.tolist()),
    )
