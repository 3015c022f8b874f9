"""`Floor`: the numbers of an answer beside those of pairs that should show nothing.

Contract: one row for the pair and one for each null pair, on the same documents: KL, what passes
the hook, the most that one latent and one change carry, and latents over a bar, 1 % of what the
latents, errors and biases of the *pair* carry in nats a token, the same bar for all rows. It is
`floor.json` of the run's folder. Limit: a null of one seed; how far it moved stands beside it.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from tl_crosscoder.config.causal import MAX_CE_COST, AttributionQuestion, ChangesQuestion
from tl_crosscoder.config.null import NullKind
from tl_crosscoder.files import CHANGES_NAME, FLOOR_NAME, HELD_OUT_NAME, WATERFALL_NAME
from tl_crosscoder.interventions.attribution_result import Attribution, measured_text
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.waterfall import REACHABLE, WHOLE, Waterfall
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.lora import LoraTrained, weights_moved
from tl_crosscoder.results.render import Section
from tl_crosscoder.results.tables import TableOfRows
from tl_crosscoder.run.attribution import (
    PARTS,
    RANKING,
    TESTS,
    attribution_on,
    predictions_of,
    waterfall_run,
)
from tl_crosscoder.run.changes import changes_run
from tl_crosscoder.run.run import Run

BAR_SHARE = 0.01
"""Share of the pair's change that a latent carries to be over the bar: of a thousand latents an
even share would be a tenth of it."""
MIN_MOVED = 0.1
"""Share of the way of the fine-tune's weights below which a null hardly moved."""
THE_PAIR = "the pair"
NAMES: dict[NullKind, str] = {
    "self": "base fine-tuned on its own samples",
    "identical": "base against itself",
}
_COMPARED = {
    "whole_kl": "KL",
    "largest_latent": "the largest latent",
    "largest_change": "the largest change",
}
_BRIEF = ("pair", "whole_kl", "whole_kl_low", "whole_kl_high", "reachable_kl", "largest_latent",
          "n_over_bar", "n_changes", "largest_change")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FloorRow:
    """One pair of models; nats are a predicted token, intervals at 95 %."""

    pair: str
    """`the pair`, or one of `NAMES`."""
    whole_kl: float
    """KL(fine-tuned || base) on the documents for tests."""
    whole_kl_low: float
    whole_kl_high: float
    reachable_kl: float
    """What of it passes the hook."""
    largest_latent: float
    """The most that one latent carries, on the documents for rankings."""
    n_over_bar: int
    """Latents that carry at least `Floor.bar`."""
    n_changes: int | None
    """Changes; None where they were not looked for."""
    largest_change: float
    """Nats of the largest change; 0 without any, NaN where they were not looked for."""
    weights_moved: float
    """Norm of the difference of the weights over that of the base's; NaN where an adapter is
    attached."""
    n_steps: int | None = None
    """Steps of the fine-tune of a null; None of other rows."""
    lr: float = math.nan
    rank: int | None = None
    ce_before: float = math.nan
    """Cross-entropy of the base's own samples in the base, nats a token."""
    ce_after: float = math.nan
    """The same in the null's fine-tuned model."""
    flag: str = ""
    """Why the null says little: it hardly moved, or it is broken."""


@dataclass(frozen=True, kw_only=True)
class Floor(TableOfRows):
    """The pair, and pairs that should show nothing."""

    ROW: ClassVar[type] = FloorRow
    rows: tuple[FloorRow, ...]
    """The pair first."""
    bar: float
    """Nats a token that a latent has to carry to be counted."""
    hook_name: str
    n_steps: int
    """Points at which gradients are taken."""
    sha256: tuple[str, str]
    """Of the token ids that KL and latents were measured on."""

    @property
    def pair(self) -> FloorRow:
        """The models of the run."""
        return self.rows[0]

    @property
    def nulls(self) -> tuple[FloorRow, ...]:
        """The pairs that should show nothing."""
        return self.rows[1:]

    def faults(self) -> list[str]:
        """Where the pair is not above a null pair; nothing where the answer clears the floor."""
        found = []
        for null in self.nulls:
            for field, what in _COMPARED.items():
                own, theirs = getattr(self.pair, field), getattr(null, field)
                is_above = own > theirs
                if field == "whole_kl":
                    is_above = self.pair.whole_kl_low > null.whole_kl_high
                if field == "largest_change":
                    is_above = is_above or own == theirs == 0  # where none is claimed
                if not (is_above or math.isnan(own) or math.isnan(theirs)):
                    found.append(
                        f"{what} is {own:.2g} nats a token, and {theirs:.2g} of the {null.pair}"
                    )
        return found

    @property
    def is_cleared(self) -> bool:
        """Whether KL (by its interval), the largest latent and change are above every null's."""
        return not self.faults()

    def warning(self) -> str:
        """What has to be said before the answer; empty where it clears the floor."""
        faults = self.faults()
        return (
            f"The answer does NOT clear the noise floor: {'; '.join(faults)}. Models that should "
            "show nothing show as much."
            if faults
            else ""
        )

    def lines(self) -> list[str]:
        """One sentence a null."""
        return [self._line(null) for null in self.nulls]

    def _line(self, null: FloorRow) -> str:
        changes = "" if null.n_changes is None else f", {_counted(null.n_changes, 'change')}"
        return (
            f"Floor ({null.pair}): KL {null.whole_kl:.3g} nats a token (the pair: "
            f"{self.pair.whole_kl:.3g}), largest latent {null.largest_latent:.2g} (the pair: "
            f"{self.pair.largest_latent:.2g}), {_counted(null.n_over_bar, 'latent')} with "
            f"{BAR_SHARE:.0%} of the pair's change (the pair: {self.pair.n_over_bar}){changes}."
            + (f" {null.flag[:1].upper()}{null.flag[1:]}." if null.flag else "")
        )

    def notes(self) -> list[str]:
        """How each null was made."""
        return [
            f"{null.pair}: {null.n_steps} steps at a learning rate of {null.lr:g}, rank "
            f"{null.rank}; cross-entropy of its own text {null.ce_before:.3f} before, "
            f"{null.ce_after:.3f} after; weights moved by {null.weights_moved:.2g} of their norm "
            f"(the pair: {self.pair.weights_moved:.2g})."
            for null in self.nulls
            if null.n_steps is not None
        ]

    def sections(self) -> list[Section]:
        """The sentences, a table, and how the nulls were made."""
        columns = {name: self.columns()[name] for name in _BRIEF}
        titles = [self.warning() or "The answer clears the noise floor.", *self.lines()]
        return [Section(notes=titles), Section(columns=columns, notes=self.notes())]


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def floor_of(run: Run) -> Floor | None:
    """The floor in a run's folder; None where none was measured.

    Raises:
        ValueError: it is damaged.
    """
    path = run.path / FLOOR_NAME
    return Floor.load(path) if path.is_file() else None


def measured_floor(
    run: Run, null: Run, *, kind: NullKind, trained: LoraTrained | None, n_prompts: int = 200
) -> Floor:
    """The floor of a run from a run on a null pair, with other nulls of the same text; kept.

    Args:
        run: of the pair.
        null: of the null pair, with the same settings.
        kind: of null pair.
        trained: how its second model was trained; None of kind `identical`.
        n_prompts: documents of each half of the text, at most.
    """
    # A run on a cache keeps no text.
    is_kept = (run.path / HELD_OUT_NAME).is_file()
    asked = AttributionQuestion(n_prompts=n_prompts)
    held_out = replace(asked, text=str((run if is_kept else null).path / HELD_OUT_NAME))
    own = measured(run, asked if is_kept else held_out)
    bar = BAR_SHARE * own.carried
    pair = own.row(THE_PAIR, bar=bar)
    # Changes of a null take as long as those of the pair, and stand beside them or not at all.
    if own.n_changes is not None and not (null.path / CHANGES_NAME).is_file():
        changes_run(null, ChangesQuestion(text=held_out.text, n_prompts=n_prompts))
    row = measured(null, held_out).row(NAMES[kind], bar=bar)
    if trained is not None:
        facts = {n: getattr(trained, n) for n in ("n_steps", "lr", "rank", "ce_before", "ce_after")}
        row = replace(row, **facts)
        row = replace(row, flag=_flag(row, pair))
    found = Floor(
        rows=(pair, row),
        bar=bar,
        hook_name=own.attribution.hook_name,
        n_steps=own.attribution.n_steps,
        sha256=own.sha256,
    )
    before = floor_of(run)
    if before is not None and before.sha256 == found.sha256:
        others = [r for r in before.nulls if r.pair != row.pair]
        found = replace(found, rows=(pair, row, *others))
    found.save(run.path / FLOOR_NAME)
    return found


def _flag(null: FloorRow, pair: FloorRow) -> str:
    rise = null.ce_after - null.ce_before
    if not rise <= MAX_CE_COST:
        return (
            f"this null is a broken model (the cross-entropy of its own text rose by {rise:.2g} "
            "nats a token), and too high a floor: take a smaller --lr or fewer --n-steps"
        )
    if null.weights_moved < MIN_MOVED * pair.weights_moved:
        return (
            f"this null hardly moved ({null.weights_moved / pair.weights_moved:.0%} of the way of "
            "the fine-tune), and is too low a floor: take a larger --lr or more --n-steps"
        )
    return ""


# --- the numbers of one pair ----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What one pair shows."""

    attribution: Attribution
    waterfall: Waterfall
    n_changes: int | None
    largest_change: float
    weights_moved: float

    @property
    def carried(self) -> float:
        """Nats a token that are shared out."""
        return self.attribution.change / self.attribution.text.n_predicted

    @property
    def sha256(self) -> tuple[str, str]:
        """Of both texts."""
        return str(self.waterfall.text["sha256"]), self.attribution.text.sha256

    def row(self, name: str, *, bar: float) -> FloorRow:
        """As a row of the table."""
        each = self.attribution.latents / self.attribution.text.n_predicted
        each = each * (1.0 if self.attribution.change >= 0 else -1.0)
        whole, reachable = self.waterfall.row(WHOLE), self.waterfall.row(REACHABLE)
        return FloorRow(
            pair=name,
            whole_kl=whole.kl,
            whole_kl_low=whole.kl_low,
            whole_kl_high=whole.kl_high,
            reachable_kl=reachable.kl,
            largest_latent=max(0.0, each.max().item()),
            n_over_bar=int(((each >= bar) & (each > 0)).sum()),
            n_changes=self.n_changes,
            largest_change=self.largest_change,
            weights_moved=self.weights_moved,
        )


def measured(run: Run, question: AttributionQuestion) -> Measured:
    """The numbers of a run, from its folder where they are of this text.

    Raises:
        ValueError, FileNotFoundError: text on which nothing can be measured.
    """
    found, passed = attribution_on(run, question), _waterfall(run, question)
    n_changes, largest = _changes(run, found)
    return Measured(
        attribution=found,
        waterfall=passed,
        n_changes=n_changes,
        largest_change=largest * abs(found.change) / found.text.n_predicted,
        weights_moved=weights_moved(*_compared(run)),
    )


def _compared(run: Run) -> list[HookedModel]:
    return [run.models.model(name) for name in run.models.compared_names]


def _changes(run: Run, of: Attribution) -> tuple[int | None, float]:
    """Number of changes in the folder, and the share of the largest; None and NaN without any.

    Those of another text are none.
    """
    path = run.path / CHANGES_NAME
    changes = Changes.load(path) if path.is_file() else None
    if changes is None or changes.texts[PARTS[RANKING]]["sha256"] != of.text.sha256:
        return None, math.nan
    shares = [row.change_share for row in changes.found]
    return len(shares), max(shares, default=0.0)


def _waterfall(run: Run, question: AttributionQuestion) -> Waterfall:
    try:
        found = Waterfall.load(run.path / WATERFALL_NAME)
        text = predictions_of(run, question, half=TESTS).text
        wanted = measured_text(text, n_predicted=0, part="").sha256
        if (found.text["sha256"], found.compared) == (wanted, run.models.compared_names):
            return found
    except (FileNotFoundError, ValueError):
        pass
    return waterfall_run(run, question)
