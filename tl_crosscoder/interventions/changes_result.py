"""`Changes`: the few things that a fine-tune changed, in texts first and then in numbers.

Contract: a row a group of latents that is found again, those whose latents cause it first; shares
and latents are of the documents for rankings, texts and causes of those for tests. Limit: numbers
and short texts; the passages are those of the run's text.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from tl_crosscoder.results.measures import spoken
from tl_crosscoder.results.render import Section
from tl_crosscoder.results.tables import TableOfRows

NONE_FOUND = "No change is found again over halves of the text."
TEXTS = ("before", "base_text", "finetuned_text", "raised", "lowered", "passages")
"""Fields of a change that are texts of the data, and what models write after them."""
N_SHOWN = 3
"""Latents that are named in a line."""
_DETAILS = (
    "place", "change_share", "agreement", "latents", "necessity", "necessity_low",
    "necessity_high", "strongest", "control_mean", "control_high", "p_control", "recovery",
    "recovery_of_others", "off_target_kl",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Change:
    """One thing that changed."""

    place: int
    change_share: float
    """Share of the whole change in nats, over the documents for rankings."""
    agreement: float
    """Cosine of its latents with those that are found again; see `grouping`."""
    latents: tuple[int, ...]
    """The first latents that together carry most of it, most first."""
    attributions: tuple[float, ...]
    """Nats of each of them in this change."""
    before: str
    """What is written before the prediction that moves most, the last of it."""
    base_text: str
    """How the base model goes on there, greedily."""
    finetuned_text: str
    raised: tuple[str, ...]
    """Tokens that the fine-tune makes likelier in its passages, most first."""
    lowered: tuple[str, ...]
    passages: tuple[str, ...]
    """The passages in which these latents carry most, the end of each."""
    n_passages: int
    """Passages of the documents for tests on which its causes are measured."""
    necessity: float
    """Share of the models' KL on its passages that ablating its latents undoes."""
    necessity_low: float
    necessity_high: float
    strongest: str
    """The strongest kind of control."""
    control_mean: float
    control_high: float
    p_control: float
    off_target_kl: float
    """KL to the unedited model on neutral text, nats a token."""
    off_target_ce: float
    recovery: float
    """Share of KL on its passages that patching its latents into the base's activation brings
    back."""
    recovery_of_others: float
    """The same share on the passages of the other changes; NaN without any."""
    doubt: str
    """Why it is not counted; empty where it is."""

    def lines(self) -> list[str]:
        """Texts, and then its latents and what they do."""
        # Where it is one, it is as short as "and 1 more".
        n = N_SHOWN + (len(self.latents) == N_SHOWN + 1)
        shown, rest = ", ".join(map(str, self.latents[:n])), len(self.latents) - n
        latents = f"latent {shown}" if len(self.latents) == 1 else f"latents {shown}"
        latents += f" and {rest} more" if rest > 0 else ""
        low, high = (f"{100 * end:.0f}" for end in (self.necessity_low, self.necessity_high))
        texts = [_quoted(t) for t in (self.before, self.base_text, self.finetuned_text)]
        written = "  after {}: {} → {}".format(*texts) if self.passages else ""
        return [
            f"{self.place}  {self.change_share:.0%} of the change{written}",
            f"   {latents}: removing them undoes {self.necessity:.0%} [{low}, {high}] "
            f"(controls {self.control_mean:.0%}), cost {self.off_target_kl:.4f} nats",
        ]


@dataclass(frozen=True, kw_only=True)
class Changes(TableOfRows):
    """The changes, largest first, and after them groups of latents that are in doubt."""

    ROW: ClassVar[type] = Change
    rows: tuple[Change, ...]
    agreements: tuple[float, ...]
    """Least agreement with 1, 2, ... groups; NaN where one of them would be too small."""
    effect: str
    compared: tuple[str, str]
    hook_name: str
    nats: float
    """KL that passes the hook, a prediction of the documents for rankings."""
    texts: dict[str, dict[str, object]]
    """Documents for rankings and for tests; see `MeasuredText`."""

    @property
    def found(self) -> tuple[Change, ...]:
        """Those that count."""
        return tuple(row for row in self.rows if not row.doubt)

    def without_texts(self) -> "Changes":
        """Numbers alone: texts are of somebody's data."""
        empty = {name: type(getattr(row, name))() for row in self.rows[:1] for name in TEXTS}
        return replace(self, rows=tuple(replace(row, **empty) for row in self.rows))

    def lines(self) -> list[str]:
        """The answer: for each change two lines, and the remarks."""
        return [*(line for row in self.found for line in row.lines()), *self.remarks()]

    def remarks(self) -> list[str]:
        """That there is no change, and why groups of latents are not counted."""
        if not self.nats:
            base, finetuned = map(spoken, self.compared)
            return [f"Nothing passes here: {finetuned} predicts the same with {base} activations."]
        doubtful, lines = [row for row in self.rows if row.doubt], list[str]()
        if not self.found:
            lines.append(NONE_FOUND if not doubtful else "No change is found.")
        if doubtful:
            reasons = "; ".join(dict.fromkeys(row.doubt for row in doubtful))
            n = len(doubtful)
            lines.append(
                f"{n} group{'s' * (n > 1)} of latents {'are' if n > 1 else 'is'} found again and "
                f"not counted: {reasons}."
            )
        return lines

    def sections(self) -> list[Section]:
        """The answer, tokens, and the numbers."""
        moved = [note for row in self.found for note in _moved(row)]
        n = len(self.found)
        title = f"What changed in {self.effect}: {n} change{'s' * (n != 1)}"
        found = [Section(title=title, notes=self.lines())]
        if moved:
            found.append(Section(title="Tokens, and passages where it happens", notes=moved))
        if self.rows:
            columns = {name: [getattr(row, name) for row in self.rows] for name in _DETAILS}
            found.append(Section(title="Causes, on the documents for tests", columns=columns))
        return found


def _moved(change: Change) -> list[str]:
    raised, lowered = (", ".join(map(repr, t)) for t in (change.raised, change.lowered))
    return [
        f"{change.place}  raises {raised or 'none'}; lowers {lowered or 'none'}",
        *(f"     {text}" for text in change.passages),
    ]


def _quoted(text: str) -> str:
    return f'"{text}"' if text else "(the end)"
