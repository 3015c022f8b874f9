"""What is asked of interventions on a run: on which prompts, of which latents, with which controls.

No torch here: the command line reads these classes to print its help. Each verb has those that it
uses: `attribute` an `AttributionQuestion`, `changes` a `ChangesQuestion`, `patch` a
`LatentsQuestion`, `baselines` an `EffectQuestion`, `ablate` and `steer` a `CausalQuestion`,
`curves` a `CurvesQuestion`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from tl_crosscoder.config.settings import NaturalInt, PositiveFloat, PositiveInt, Settings

Control = Literal["random", "covariance", "shuffled", "matched"]
CONTROLS: tuple[Control, ...] = get_args(Control)
"""Kinds of control, the cheapest to make first; see `interventions.controls`."""
MAX_CE_COST = 0.5
"""Nats a token of neutral text above which an edited model is called broken: they multiply its
perplexity by 1.65. Ablating the first 30 latents of the embedded dictionaries costs 0.07 to
0.19 nats of KL on held-out text, so the bound leaves space for honest edits."""

CURVE_SIZES = (1, 2, 3, 5, 10, 20, 30, 50)
"""Numbers of latents and directions at which curves are measured."""
Method = Literal["pca", "pca-neutral", "adl", "weights", "sae"]
METHODS: tuple[Method, ...] = get_args(Method)
"""Methods without a dictionary whose directions curves can have."""

Order = Literal["attribution", "score", "relative_decoder_norm", "difference", "nu", "activity"]
"""Orders of latents where the models are at hand; all but the first need measures alone."""


@dataclass(frozen=True, kw_only=True)
class AttributionSettings(Settings):
    """How the change is shared out over latents."""

    n_steps: PositiveInt = 4
    """Points between the base's activation and the fine-tuned one at which gradients are taken
    (midpoints of as many equal steps): more leave a smaller residual and take longer."""
    at_base: bool = False
    """Take the gradient at the base's activation alone: cheaper, and without completeness."""


@dataclass(frozen=True, kw_only=True)
class PromptsQuestion(Settings):
    """Prompts to measure on."""

    text: str | None = None
    """Prompts to measure on: a file, a folder, or a `datasets` name. None is the run's held-out
    text; where there are chats, they alone. Half of the documents, by content, are for rankings,
    and the other half for tests."""
    n_prompts: PositiveInt = 100
    """Measure on so many of them."""
    seed: NaturalInt = 0
    """Seed of controls and resamples."""


@dataclass(frozen=True, kw_only=True)
class AttributedText(AttributionSettings):
    """On which documents predictions are explained, and how."""

    text: str | None = None
    """Text whose predictions are explained: a file, a folder, or a `datasets` name. None is the
    run's held-out text. Of chats the responses count, of plain text every token. Half of the
    documents, by content, are for rankings, and the other half for tests."""
    n_prompts: PositiveInt = 200
    """So many documents of each half, spread over the text."""
    seed: NaturalInt = 0
    """Seed of halves, controls and resamples."""
    toward: Literal["finetuned", "base"] = "finetuned"
    """Model whose predictions are explained: the other one's activation is put into it."""


@dataclass(frozen=True, kw_only=True)
class AttributionQuestion(AttributedText):
    """What is shared out over latents, on which documents, and how."""

    goal: Literal["predictions", "behaviour"] = "predictions"
    """Share out the KL to the fine-tuned model's predictions, or the change in the log-probability
    of a behaviour."""
    behaviour: str | None = None
    """JSONL of prompts and completions for that goal. None is the first planted behaviour of an
    embedded organism."""


@dataclass(frozen=True, kw_only=True)
class ChangesQuestion(AttributedText):
    """On which documents changes are looked for, and how their causes are tested."""

    neutral: str | None = None
    """Text that has nothing to do with the fine-tune, on which the cost of ablations is measured;
    as for `ablate`."""
    n_random: PositiveInt = 19
    """Controls of each of the two strongest kinds."""


@dataclass(frozen=True, kw_only=True)
class LatentsQuestion(PromptsQuestion):
    """Prompts, and latents to test."""

    latents: tuple[NaturalInt, ...] | None = None
    """Latents to test, together; none are the first 3, 10 and 30 of the order."""
    order: Order = "attribution"
    """Order of the latents: `attribution` is how much of the change each carries, computed now
    where the run's folder has none; the others are those of `analyze --by`."""


@dataclass(frozen=True, kw_only=True)
class EffectQuestion(PromptsQuestion):
    """Prompts, what to measure beside predictions, and controls."""

    behaviour: str | tuple[str, ...] | None = None
    """JSONL files of prompts and completions, or folders of them: the probability of its
    completions is a behaviour, each tested by itself. None is all that was planted in an embedded
    organism; else predictions alone are measured."""
    neutral: str | None = None
    """Text that has nothing to do with the fine-tune, on which the cost of edits is measured; a
    file, a folder, or a `datasets` name. None is the run's held-out text, of an embedded organism
    without what is about the planted behaviour."""
    controls: tuple[Control, ...] = CONTROLS
    """Kinds of control: isotropic directions (`random`), directions with the covariance of the
    difference (`covariance`), rows of other latents (`shuffled`), other latents (`matched`). The
    time of a test grows with their number."""
    n_random: PositiveInt = 100
    """Controls of each kind but `matched`."""
    first_round: NaturalInt = 10
    """Run so many of each kind first, and then only the others of the strongest kind, unless 3 of
    the first did as much as what is tested: such a p-value cannot become small. 0 runs all."""
    max_ce_cost: PositiveFloat = MAX_CE_COST
    """Nats a token by which an edit may raise the cross-entropy of neutral text before its shares
    are marked as those of a broken model."""


@dataclass(frozen=True, kw_only=True)
class ControlledQuestion(EffectQuestion):
    """An `EffectQuestion` of latents, with latents as controls too."""

    n_matched: NaturalInt = 10
    """Sets of latents of the same firing rate as controls."""
    null: str | None = None
    """Folder of another dictionary at the same hook, whose directions are one more control: of a
    null pair, such as RUN/null/self that the verb `null` makes, or of another fine-tune."""


@dataclass(frozen=True, kw_only=True)
class CausalQuestion(LatentsQuestion, ControlledQuestion):
    """Everything that a test of latents is asked, with all controls."""


@dataclass(frozen=True, kw_only=True)
class CurvesQuestion(ControlledQuestion):
    """How many latents or directions it takes, and with which controls."""

    orders: tuple[Order, ...] | None = None
    """Orders of latents, as in `ablate --order`; the first one has the controls. None are all that
    the dictionary has, `attribution` first."""
    methods: tuple[Method, ...] | None = None
    """Methods without a dictionary whose first directions stand beside the latents: principal
    components of the difference, of all held-out text (`pca`) and of neutral text alone
    (`pca-neutral`); its mean, over all tokens and then by position (`adl`); singular vectors of the
    weights' difference (`weights`); latents of an SAE of the base (`sae`). None are all that these
    models have."""
    sae: str | None = None
    """Folder of an SAE of the base model at this hook, as SAELens saves it, for `sae`."""
    sizes: tuple[PositiveInt, ...] = CURVE_SIZES
    """Numbers of latents and directions; all latents together are always measured."""
    controls: tuple[Control, ...] = ("covariance", "matched")
    """Kinds of control, at every number: as in `ablate`, of which these two are the ones that
    differ most. The time grows with their number."""
    n_random: PositiveInt = 99
    """Controls of each kind but `matched`."""
    n_matched: NaturalInt = 99
    """Sets of latents of the same firing rate as controls."""
