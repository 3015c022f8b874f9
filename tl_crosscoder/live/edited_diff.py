"""What an edited model writes beside the models as they are: `diff.ablate([3]).generate("...")`.

Contract: an `EditedDiff` is a plan; a model has hooks only while it runs, and none after that,
whatever happens. Prompts are a user's turns where the tokenizer has a chat template, else plain
text. Limit: text in a notebook; with controls an effect is tested by `causal_test`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Int
from markupsafe import Markup
from torch import Tensor

from tl_crosscoder.activations.documents import Document
from tl_crosscoder.causal import prompt_ids
from tl_crosscoder.html_tables import box, note, table
from tl_crosscoder.interventions.edits import Edit, Shift
from tl_crosscoder.interventions.live import EditedModel, edited
from tl_crosscoder.interventions.subject import Subject
from tl_crosscoder.run_folder import RunFolder
from tl_crosscoder.tables import TableOfRows
from tl_crosscoder.visualize.causal_tables import samples_table
from tl_crosscoder.visualize.circuits_html import TokensHtml
from tl_crosscoder.visualize.terminal import spoken
from tl_crosscoder.visualize.tokens import edited_tokens

N_NEW_TOKENS = 40


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
        return samples_table(each)

    def fragment(self) -> Markup:
        """The table alone."""
        texts = {f"{spoken(name)} model": texts for name, texts in self.texts.items()}
        return table({"prompt": self.prompts, **texts})

    def _repr_html_(self) -> str:
        return box(note(self.edit), self.fragment())


@dataclass(frozen=True, kw_only=True, eq=False)
class EditedDiff:
    """One of the models with an edit, whenever it runs."""

    run: RunFolder
    subject: Subject
    edit: Edit
    name: str
    """What is done, in words."""

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new_tokens: int = N_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generations:
        """What base, fine-tuned and edited model write.

        Args:
            prompts: one or several.
            max_new_tokens: at most so many each.
            temperature: 0 is greedy.
            seed: of sampling, the same for all three.

        Raises:
            ValueError: prompts that are longer than the models' context.
        """
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
        return written(self.run, self.subject, prompts, edited=self, options=options)

    def log_probs(self, text: str | Document) -> TokensHtml:
        """Log-probability of each token of a text before and after the edit."""
        return edited_tokens(self.subject.models, text, self.open())

    def open(self) -> AbstractContextManager[EditedModel]:
        """The edited model, while the context is open: `with diff.ablate([3]).open() as model:`."""
        return edited(self.subject, self.edit)

    def __repr__(self) -> str:
        return f"EditedDiff({self.name}; .generate(prompts), .log_probs(text), .open())"


def insertion(subject: Subject, latents: Sequence[int] | Int[Tensor, " n"]) -> Shift:
    """The base model's stream plus what some latents add to it: x^0 + sum f_j (d_j^1 - d_j^0).

    The patch of Minder et al. 2025 (arXiv 2504.02922) in the base model, as `causal_test` inserts
    it. Raises ValueError for latents out of range.
    """
    ids, site = subject.latents(latents), subject.base
    return Shift(site=site, stream=site, latents=ids, directions=subject.difference[ids])


def written(
    run: RunFolder,
    subject: Subject,
    prompts: str | Sequence[str],
    *,
    options: dict[str, float],
    edited: EditedDiff | None = None,
) -> Generations:
    """What both models write, and an edited one; options are those of `generate_tokens`."""
    each = [prompts] if isinstance(prompts, str) else [*prompts]
    ids = [prompt_ids(run, prompt) for prompt in each]
    sites = [subject.site_name(i) for i in (subject.base, subject.finetuned)]
    texts = {site: subject.models.generate(ids, site=site, **options) for site in sites}
    if edited is not None:
        with edited.open() as model:
            texts["edited"] = model.generate(ids, **options)
    rows = [
        Generation(prompt=prompt, model=model, text=own[i])
        for i, prompt in enumerate(each)
        for model, own in texts.items()
    ]
    return Generations(rows=tuple(rows), edit="" if edited is None else edited.name)
