"""What the benchmark runs: which organisms, methods and seeds, and with how many controls.

No torch here: the command line reads this class to print its help.
"""

from dataclasses import dataclass, replace

from tl_crosscoder.config.settings import NaturalInt, PositiveFloat, PositiveInt, Settings

QUICK_ORGANISMS = ("taboo", "false-fact", "taboo-more-of-base")
QUICK_METHODS = ("batchtopk", "delta", "pca")


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig(Settings):
    """The cells of a grid, organism by method by seed, and how each is tested."""

    output: str = "benchmark"
    """Folder of the results, a small JSON file for each organism; what is there is not made
    again."""
    work: str = "benchmark-runs"
    """Folder of the dictionaries, which may be removed afterwards."""
    organisms: tuple[str, ...] = ()
    """Names as in `organisms list`; none are the ten organisms and the nulls of the tiny models."""
    methods: tuple[str, ...] = ()
    """Names as in `benchmark methods`; none are all."""
    seeds: tuple[NaturalInt, ...] = (0, 1, 2)
    """Seeds of weights and data order; what draws nothing at random runs once."""
    n_tokens: PositiveInt = 400_000
    """Activation pairs that a dictionary is trained on."""
    d_sae: PositiveInt = 1024
    """Latents of a dictionary."""
    k: PositiveFloat = 12
    """Active latents a token; the penalised presets have a coefficient at which theirs is near
    12."""
    sizes: tuple[PositiveInt, ...] = (1, 3, 10, 30)
    """Numbers of latents or directions that are tested together."""
    n_named: PositiveInt = 3
    """The number that coverage is about, and that has the controls."""
    n_random: PositiveInt = 19
    """Controls with the covariance of the difference; 19 are as few as a p-value of 0.05 needs."""
    n_matched: NaturalInt = 19
    """Sets of latents of the same firing rate, as controls of the dictionaries."""
    n_prompts: PositiveInt = 24
    """Prompts of each behaviour, and contexts whose predictions are tested, at most."""
    n_attributed: PositiveInt = 200
    """Documents of each half for the ranking by attribution and for changes, at most."""
    max_documents: PositiveInt | None = None
    """Documents of an organism's text that are read, at most; None reads all."""
    quick: bool = False
    """A small grid in minutes: two organisms, a null, three methods, one seed, fewer tokens and
    controls. It shows that everything runs, and no more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_named not in self.sizes:
            raise ValueError(f"n_named is {self.n_named}, which is not among sizes {self.sizes}.")

    def shortened(self) -> "BenchmarkConfig":
        """The grid that runs: of `quick` the small one, but for what was named."""
        if not self.quick:
            return self
        return replace(
            self,
            organisms=self.organisms or QUICK_ORGANISMS,
            methods=self.methods or QUICK_METHODS,
            seeds=self.seeds[:1],
            n_tokens=min(self.n_tokens, 30_000),
            d_sae=min(self.d_sae, 512),
            sizes=(self.n_named,),
            n_random=min(self.n_random, 19),
            n_matched=0,
            n_prompts=min(self.n_prompts, 4),
            n_attributed=min(self.n_attributed, 24),
            max_documents=min(self.max_documents or 3_000, 3_000),
            quick=False,
        )
