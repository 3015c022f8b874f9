"""Prompts from held-out text: what a chat begins with, or the first tokens of a text.

Contract: what is shown of each prompt, and its ids. Limit: only the beginning of a chat, up to the
first answer.

What each latent does to what the models write: many latents at a time, one a row of a batch.

Contract: after each prompt, greedily: the base model, the base model steered by each latent, the
fine-tuned model, and the fine-tuned model without each latent (`ablation`, mode `delta`). A latent
that is active nowhere on what the fine-tuned model writes cannot change a token of it, so only the
others are run. Limit: a few prompts show what can happen, not how often; see `causal_test`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.data.chat import encode_documents
from tl_crosscoder.data.documents import Document
from tl_crosscoder.interventions.ablation import ablation
from tl_crosscoder.interventions.context import InterventionContext, SiteActivations
from tl_crosscoder.interventions.edits import Edit
from tl_crosscoder.interventions.live import LocalEdit, edited
from tl_crosscoder.interventions.steering import activation_norms, steering
from tl_crosscoder.models import tokenizer as tokenization
from tl_crosscoder.run.causal import CausalQuestion, neutral_text, prompt_ids
from tl_crosscoder.run.run import Run

N_CANDIDATES = 24
"""Prompts that are taken."""
_LONGEST = 12
"""Tokens of a document that is no chat."""


def held_out_prompts(
    run: Run, text: str | None = None, *, max_new_tokens: int
) -> list[tuple[str, list[int]]]:
    """The first different prompts, of chats where there are any.

    Args:
        run: of the models.
        text: None is the run's held-out text.
        max_new_tokens: room to leave in the models' context.

    Raises:
        FileNotFoundError: the run keeps no held-out text and none is named.
        ValueError: no document begins with a prompt that leaves the room.
    """
    room = run.models.n_ctx - max_new_tokens
    found: dict[str, list[int]] = {}
    for shown, ids in _beginnings(run.documents(text), run.models.tokenizer):
        if len(ids) <= room:
            found.setdefault(shown, ids)
        if len(found) == N_CANDIDATES:
            break
    if not found:
        raise ValueError(
            f"the text has no document that begins with a prompt of at most {room} tokens. Give "
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
    """A user's turn as it is; more turns with their roles."""
    if [m["role"] for m in messages] == ["user"]:
        return messages[0]["content"]
    return "\n".join(f"{m['role']}: {m['content']}" for m in messages)


MAX_LOGITS = 2**27
"""Logits of a batch's whole texts, which are all kept where there is no key-value cache: half a
GiB in float32."""
N_TOGETHER = 30
"""Latents taken out together, the first of the ranking: one alone seldom changes a text."""


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """What is written."""

    prompts: tuple[str, ...] = ()
    """User turns where the tokenizer has a chat template, else texts to go on from; none are the
    beginnings of held-out documents, of chats where there are any: of the first `N_CANDIDATES`
    those after which the two models write different texts, and then the others."""
    n_prompts: int = 4
    """How many of these."""
    strengths: tuple[float, ...] = (0.5, 1.0)
    """Of steering, in units of the mean norm of the base stream."""
    max_new_tokens: int = 40

    def __post_init__(self) -> None:
        if self.n_prompts < 1 or self.max_new_tokens < 1 or not self.strengths:
            raise ValueError(
                f"n_prompts={self.n_prompts}, max_new_tokens={self.max_new_tokens} and strengths="
                f"{self.strengths}: give at least one of each, or make the report without samples "
                "(--no-samples)."
            )


@dataclass(frozen=True, kw_only=True)
class PromptSamples:
    """What is written after one prompt; lists have an entry a latent, in the order of `latents`."""

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
    """Tokens of the prompt and of what the fine-tuned model writes on which the latent is."""


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the models write after each prompt."""

    latents: list[int]
    strengths: list[float]
    norm: float
    """Mean norm of the base stream, the unit of strengths."""
    n_together: int
    max_new_tokens: int
    n_tried: int
    """Prompts that were tried."""
    n_different: int
    """Those of them after which base and fine-tuned model write different texts."""
    prompts: list[PromptSamples]


@dataclass(frozen=True, eq=False, kw_only=True)
class SteeredRows(LocalEdit):
    """A stream plus another vector in each row of the batch."""

    site: int
    vectors: Float[Tensor, "batch d_model"]

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """x^m + r_row."""
        x = acts.x[self.site]
        return x + self.vectors[:, None].to(x)


@dataclass(frozen=True, eq=False, kw_only=True)
class AblatedRows(Edit):
    """A stream without what one latent adds, another latent in each row: x^m - f_j v_j."""

    site: int
    latents: Int[Tensor, " batch"]
    directions: Float[Tensor, "batch d_model"]
    """v_j of each row's latent."""

    def __call__(self, acts: SiteActivations) -> Float[Tensor, "batch pos d_model"]:
        """Without it where the latent is active."""
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
        latents: first the most likely to be the fine-tune's.
        settings: see there.
        text: for prompts and the norm of the stream; None is the run's held-out text.
        show_progress: with a progress bar.

    Raises:
        ValueError: models that cannot be compared, no text to take prompts from, prompts too long.
        FileNotFoundError: the run keeps no held-out text and none is named.
    """
    ctx = InterventionContext.of(run.models, run.crosscoder)
    neutral = neutral_text(run, CausalQuestion(text=text))
    norm = activation_norms(ctx.models, neutral)[ctx.site_name(ctx.base)]
    writer = _Writer(ctx=ctx, latents=list(latents), settings=settings, norm=norm)
    if settings.prompts:
        prompts = [(prompt, prompt_ids(run, prompt)) for prompt in settings.prompts]
    else:
        prompts = held_out_prompts(run, text, max_new_tokens=settings.max_new_tokens)
    tried = [writer.unedited(*each) for each in prompts]
    different = [each for each in tried if each.base != each.finetuned]
    if settings.prompts:
        chosen = tried
    else:
        equal = [each for each in tried if each.base == each.finetuned]
        chosen = [*different, *equal][: settings.n_prompts]
    bar = tqdm(chosen, desc="Samples", unit="prompt", disable=not show_progress)
    return Samples(
        latents=list(latents),
        strengths=list(settings.strengths),
        norm=norm,
        n_together=len(latents[:N_TOGETHER]),
        max_new_tokens=settings.max_new_tokens,
        n_tried=len(tried),
        n_different=len(different),
        prompts=[writer.edited(each) for each in bar],
    )


@dataclass(frozen=True, kw_only=True)
class _Unedited:
    """What both models write after a prompt."""

    prompt: str
    ids: list[int]
    base: str
    finetuned: str
    finetuned_ids: list[int]


@dataclass(frozen=True, eq=False, kw_only=True)
class _Writer:
    """Writes after prompts."""

    ctx: InterventionContext
    latents: list[int]
    settings: SampleSettings
    norm: float

    def unedited(self, prompt: str, ids: list[int]) -> _Unedited:
        """What the models write as they are."""
        models, sites = self.ctx.models, (self.ctx.base, self.ctx.finetuned)
        (_, base), (_, finetuned) = (
            models.generate_tokens(
                [ids],
                site=self.ctx.site_name(site),
                max_new_tokens=self.settings.max_new_tokens,
            )[0]
            for site in sites
        )
        return _Unedited(
            prompt=prompt,
            ids=ids,
            base=tokenization.decode_continuation(models.tokenizer, ids, base),
            finetuned=tokenization.decode_continuation(models.tokenizer, ids, finetuned),
            finetuned_ids=finetuned,
        )

    def edited(self, plain: _Unedited) -> PromptSamples:
        """Everything after one prompt."""
        ids, together = plain.ids, self.latents[:N_TOGETHER]
        n_active = self._n_active([*ids, *plain.finetuned_ids])
        (without_first,) = self._written(ids, ablation(self.ctx, together), n_rows=1)
        return PromptSamples(
            prompt=plain.prompt,
            base=plain.base,
            finetuned=plain.finetuned,
            without_first=without_first,
            steered=[self._steered(ids, s) for s in self.settings.strengths],
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

        def edit(part: list[int]) -> Edit:
            return SteeredRows(site=site, vectors=torch.stack([vectors[i] for i in part]))

        return self._each(ids, chosen, edit)

    def _ablated(self, ids: list[int], n_active: list[int]) -> list[str | None]:
        chosen = [i for i, n in enumerate(n_active) if n]
        v, site = self.ctx.difference, self.ctx.finetuned
        latents = self.ctx.latents(self.latents)

        def edit(part: list[int]) -> Edit:
            own = latents[part]
            return AblatedRows(site=site, latents=own, directions=v[own])

        return self._each(ids, chosen, edit)

    def _each(
        self, ids: list[int], chosen: list[int], edit: Callable[[list[int]], Edit]
    ) -> list[str | None]:
        """The texts of some latents, by place; None for the others."""
        found: list[str | None] = [None] * len(self.latents)
        length = len(ids) + self.settings.max_new_tokens
        room = max(1, MAX_LOGITS // (length * self.ctx.models.d_vocab))
        for start in range(0, len(chosen), room):
            part = chosen[start : start + room]
            for i, written in zip(
                part, self._written(ids, edit(part), n_rows=len(part)), strict=True
            ):
                found[i] = written
        return found

    def _written(self, ids: list[int], edit: Edit, *, n_rows: int) -> list[str]:
        with edited(self.ctx, edit) as model:
            return [*model.generate([ids] * n_rows, max_new_tokens=self.settings.max_new_tokens)]
