"""Texts of the models after held-out prompts, steered by each latent and with each ablated.

Contract: after each prompt, greedily: the base model, the base model steered by each latent, the
fine-tuned model, and the fine-tuned model without each latent (`ablation`, mode `delta`); many
latents at a time, one a row of a batch. Ablating a latent that is active nowhere on what the
fine-tuned model writes cannot change a token of it, so only the others are run. Limit: a few
prompts show what can happen, not how often; see `causal_test`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.data.chat import encode_documents
from tl_crosscoder.data.documents import Document
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import AddVector, Edit
from tl_crosscoder.interventions.latent_edits import ablation, activation_norms, steering
from tl_crosscoder.interventions.live import edited
from tl_crosscoder.models.tokenizer import decode_continuation
from tl_crosscoder.progress import progress
from tl_crosscoder.run.causal import neutral_text, prompt_ids
from tl_crosscoder.run.run import Run

N_CANDIDATES = 24
"""Held-out prompts that are tried."""
_LONGEST = 12
"""Tokens of a document that is not a chat."""


def held_out_prompts(
    run: Run, text: str | None = None, *, max_new_tokens: int
) -> list[tuple[str, list[int]]]:
    """The first different prompts of held-out text, of chats where there are any, with their ids.

    Args:
        run: of the models.
        text: None is the run's held-out text.
        max_new_tokens: space to leave in the models' context.

    Raises:
        FileNotFoundError: the run keeps no held-out text and none is named.
        ValueError: no document begins with a prompt that leaves this space.
    """
    space = run.models.n_ctx - max_new_tokens
    found: dict[str, list[int]] = {}
    for shown, ids in _beginnings(run.documents(text), run.models.tokenizer):
        if len(ids) <= space:
            found.setdefault(shown, ids)
        if len(found) == N_CANDIDATES:
            break
    if not found:
        raise ValueError(
            f"the text has no document that begins with a prompt of at most {space} tokens. Give "
            "prompts (--prompts), or make the report without samples (--no-samples)."
        )
    return [*found.items()]


def _beginnings(documents: Sequence[Document], tokenizer: Any) -> Iterator[tuple[str, list[int]]]:
    chats = [d["messages"] for d in documents if "messages" in d]
    for messages in chats:
        asked = [*takewhile(lambda m: m["role"] != "assistant", messages)]
        if asked:
            document: Document = {"messages": asked}
            (encoded,) = encode_documents([document], tokenizer, add_generation_prompt=True)
            yield _shown(asked), encoded.ids.tolist()
    for document in documents if not chats else ():
        (encoded,) = encode_documents([document], tokenizer)
        ids = encoded.ids[:_LONGEST].tolist()
        if ids:
            yield tokenizer.decode(ids, skip_special_tokens=True), ids


def _shown(messages: Sequence[dict[str, str]]) -> str:
    """Text of a single user's turn; several turns with their roles."""
    if [m["role"] for m in messages] == ["user"]:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


MAX_LOGITS = 2**27
"""Logits of a batch's whole texts, which are all kept where there is no key-value cache: half a
GiB in float32."""
N_TOGETHER = 30
"""Latents ablated together, the first of the ranking: one alone seldom changes a text."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Prompts, strengths and lengths of the texts that models write."""

    prompts: tuple[str, ...] = ()
    """User turns where the tokenizer has a chat template, else texts to go on from; none are the
    beginnings of held-out documents, of chats where there are any: of the first `N_CANDIDATES`
    those after which the two models write different texts, and then the others."""
    n_prompts: int = 4
    """How many of these."""
    strengths: tuple[float, ...] = (0.5, 1.0)
    """Strengths of steering, in units of the mean norm of the base activation."""
    max_new_tokens: int = 40
    n_latents: int = 100
    """The first of the report's latents, which are steered by and ablated one by one."""

    def __post_init__(self) -> None:
        counts = self.n_prompts, self.max_new_tokens, self.n_latents
        if min(counts) < 1 or not self.strengths:
            raise ValueError(
                f"n_prompts={self.n_prompts}, max_new_tokens={self.max_new_tokens}, n_latents="
                f"{self.n_latents} and strengths={self.strengths}: give at least one of "
                "each, or make the report without samples (--no-samples)."
            )


@dataclass(frozen=True, kw_only=True)
class PromptSamples:
    """Texts after one prompt; lists have an entry a latent, in the order of `Samples.latents`."""

    prompt: str
    base: str
    finetuned: str
    without_first: str
    """The fine-tuned model without the first `n_together` latents."""
    steered: list[list[str | None]]
    """For each strength; None for a latent whose row is zero."""
    ablated: list[str | None]
    """None where the latent is active nowhere: what the fine-tuned model writes."""
    n_active: list[int]
    """Tokens of the prompt and of the fine-tuned model's text on which the latent is active."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Texts after every prompt."""

    latents: list[int]
    strengths: list[float]
    norm: float
    """Mean norm of the base activation, the unit of strengths."""
    n_together: int
    max_new_tokens: int
    n_tried: int
    """Prompts that were tried."""
    n_different: int
    """Prompts after which base and fine-tuned model write different texts."""
    prompts: list[PromptSamples]


@dataclass(frozen=True, eq=False, kw_only=True)
class AblatedRows(Edit):
    """An activation without what one latent adds, another latent in each row: x^m - f_j v_j."""

    site: int
    latents: Int[Tensor, " batch"]
    directions: Float[Tensor, "batch d_model"]
    """v_j of each row's latent."""

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """x^m - f_j v_j where the row's latent is active."""
        x, codes = acts.x[self.site], acts.codes
        assert codes is not None, "latents need a dictionary"
        tokens = codes.pattern.tokens.long()
        is_own = codes.pattern.latents == self.latents[tokens // x.shape[1]]
        f = x.new_zeros(x.shape[0] * x.shape[1])
        f[tokens[is_own]] = codes.values[is_own].to(f)
        return x - f.view(*x.shape[:2], 1) * self.directions[:, None].to(x)


@dataclass(eq=False)
class _Watched(Edit):
    """Nothing is changed; the codes of the last pass are kept."""

    site: int
    codes: SparseCodes | None = None

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        self.codes = acts.codes
        return acts.x[self.site]


def sample_latents(
    run: Run,
    latents: Sequence[int],
    settings: SampleSettings,
    *,
    text: str | None = None,
    show_progress: bool = False,
) -> Samples:
    """Write after every prompt with every latent.

    Args:
        run: its models and dictionary.
        latents: first the most likely to be specific to the fine-tune.
        settings: prompts, strengths and lengths.
        text: for prompts and the norm of the activation; None is the run's held-out text.
        show_progress: with a progress bar.

    Raises:
        ValueError: models that cannot be compared, no text to take prompts from, prompts too long.
        FileNotFoundError: the run keeps no held-out text and none is named.
    """
    ctx = InterventionContext.of(run.models, run.crosscoder)
    neutral = neutral_text(run, text)
    norm = activation_norms(ctx.models, neutral)[ctx.site_name(ctx.base)]
    writer = _Writer(ctx=ctx, latents=list(latents), settings=settings, norm=norm)
    if settings.prompts:
        prompts = [(prompt, prompt_ids(run, prompt)) for prompt in settings.prompts]
    else:
        prompts = held_out_prompts(run, text, max_new_tokens=settings.max_new_tokens)
    tried = [_Unedited.of(ctx, *each, n_new=settings.max_new_tokens) for each in prompts]
    n_different = sum(each.base != each.finetuned for each in tried)
    chosen = tried
    if not settings.prompts:
        chosen = sorted(tried, key=lambda each: each.base == each.finetuned)[: settings.n_prompts]
    bar = progress(chosen, desc="Samples", unit="prompt", show=show_progress)
    return Samples(
        latents=list(latents),
        strengths=list(settings.strengths),
        norm=norm,
        n_together=len(latents[:N_TOGETHER]),
        max_new_tokens=settings.max_new_tokens,
        n_tried=len(tried),
        n_different=n_different,
        prompts=[writer.edited(each) for each in bar],
    )


@dataclass(frozen=True, kw_only=True)
class _Unedited:
    """Texts of both models after a prompt."""

    prompt: str
    ids: list[int]
    base: str
    finetuned: str
    finetuned_ids: list[int]

    @classmethod
    def of(
        cls, ctx: InterventionContext, prompt: str, ids: list[int], *, n_new: int
    ) -> "_Unedited":
        (base, finetuned) = (
            ctx.models.generate_tokens([ids], site=ctx.site_name(site), max_new_tokens=n_new)[0][1]
            for site in (ctx.base, ctx.finetuned)
        )
        tokenizer = ctx.models.tokenizer
        return cls(
            prompt=prompt,
            ids=ids,
            base=decode_continuation(tokenizer, ids, base),
            finetuned=decode_continuation(tokenizer, ids, finetuned),
            finetuned_ids=finetuned,
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class _Writer:
    """Writes with every latent after a prompt."""

    ctx: InterventionContext
    latents: list[int]
    settings: SampleSettings
    norm: float

    def edited(self, plain: _Unedited) -> PromptSamples:
        """Texts of the edited models after one prompt."""
        ids, together = plain.ids, self.latents[:N_TOGETHER]
        n_active = self._n_active([*ids, *plain.finetuned_ids])
        (without_first,) = self._written(ids, ablation(self.ctx, together), n_rows=1)
        return PromptSamples(
            prompt=plain.prompt,
            base=plain.base,
            finetuned=plain.finetuned,
            without_first=without_first,
            steered=[self._steered(ids, strength) for strength in self.settings.strengths],
            ablated=self._ablated(ids, n_active),
            n_active=n_active,
        )

    def _n_active(self, ids: list[int]) -> list[int]:
        """Tokens on which each latent is active, by the codes that its ablation sees."""
        watched = _Watched(site=self.ctx.finetuned)
        with edited(self.ctx, watched) as model:
            model.logits(torch.tensor([ids]))
        assert watched.codes is not None
        counts = torch.bincount(
            watched.codes.pattern.latents.long(), minlength=self.ctx.dictionary.cfg.d_sae
        )
        return counts[torch.tensor(self.latents, device=counts.device)].tolist()

    def _steered(self, ids: list[int], strength: float) -> list[str | None]:
        site = self.ctx.base
        rows = self.ctx.decoder(self.ctx.finetuned)[self.latents]
        chosen = [i for i, length in enumerate(rows.norm(dim=1).tolist()) if length > 0]
        how = {"strength": strength, "norm": self.norm, "site": self.ctx.site_name(site)}
        vectors = {i: steering(self.ctx, self.latents[i], **how).vector for i in chosen}

        def edit(batch: list[int]) -> Edit:
            rows = torch.stack([vectors[i] for i in batch])
            return AddVector(site=site, stream=site, vector=rows[:, None])

        return self._each(ids, chosen, edit)

    def _ablated(self, ids: list[int], n_active: list[int]) -> list[str | None]:
        chosen = [i for i, n in enumerate(n_active) if n]
        v, site = self.ctx.difference, self.ctx.finetuned
        latents = self.ctx.latents(self.latents)

        def edit(batch: list[int]) -> Edit:
            own = latents[batch]
            return AblatedRows(site=site, latents=own, directions=v[own])

        return self._each(ids, chosen, edit)

    def _each(
        self, ids: list[int], chosen: list[int], edit: Callable[[list[int]], Edit]
    ) -> list[str | None]:
        """Texts of some latents, by place; None for the others."""
        found: list[str | None] = [None] * len(self.latents)
        length = len(ids) + self.settings.max_new_tokens
        size = max(1, MAX_LOGITS // (length * self.ctx.models.d_vocab))
        for start in range(0, len(chosen), size):
            batch = chosen[start : start + size]
            texts = self._written(ids, edit(batch), n_rows=len(batch))
            for i, text in zip(batch, texts, strict=True):
                found[i] = text
        return found

    def _written(self, ids: list[int], edit: Edit, *, n_rows: int) -> list[str]:
        with edited(self.ctx, edit) as model:
            return [*model.generate([ids] * n_rows, max_new_tokens=self.settings.max_new_tokens)]
