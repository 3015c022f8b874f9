"""Verbs of the command line that make data: `harvest`, `inspect`, `contrastive`.

No torch is imported before a verb runs.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from tl_crosscoder.config.inputs import ContrastiveConfig
from tl_crosscoder.config.training import HarvestConfig


@dataclass(frozen=True, kw_only=True)
class Harvest:
    """Run the models over a text once and keep the activations, for any number of trainings."""

    run: Annotated[HarvestConfig, tyro.conf.OmitArgPrefixes]
    config: str | None = None
    """YAML file of the same fields; flags win over it."""
    dry_run: bool = False
    """Print an estimate of download, memory, disk and FLOPs, and do nothing: not even download."""
    resume: bool = False
    """Go on with the cache in the output folder at the shard where it stopped."""
    workers: int = 1
    """Processes that write the shards in turns, each with its models; `torchrun` starts as many on
    several machines."""

    def __call__(self) -> None:
        """Harvest and print."""
        if self.dry_run:
            from tl_crosscoder.run.estimate import estimate_harvest

            print(estimate_harvest(self.run))
            return
        from tl_crosscoder.data.cache_writer import run_harvest
        from tl_crosscoder.mesh import process_index, ran_by_workers
        from tl_crosscoder.report.sections import cache_sections
        from tl_crosscoder.results.render import as_text

        if ran_by_workers(self.workers):
            return
        cache = run_harvest(self.run, resume=self.resume)
        if process_index() == 0:
            print(as_text(cache_sections(cache)))


@dataclass(frozen=True, kw_only=True)
class Contrastive:
    """Let each model continue the same prompts, for texts that show where they differ."""

    run: Annotated[ContrastiveConfig, tyro.conf.OmitArgPrefixes]
    config: str | None = None
    """YAML file of the same fields, or of a training run, of which the models are taken; flags win
    over it."""
    resume: bool = False
    """Go on with the file at the batch where it stopped."""

    def __call__(self) -> None:
        """Sample and print."""
        from tl_crosscoder.run.contrastive import describe_contrastive, write_contrastive

        print(describe_contrastive(write_contrastive(self.run, resume=self.resume)))


@dataclass(frozen=True, kw_only=True)
class Inspect:
    """Print what a cache of activations holds, and what is known of its sites."""

    cache: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CACHE")]
    """Folder that `harvest` wrote."""
    verify: bool = False
    """Compare every shard with its sha256 first."""

    def __call__(self) -> None:
        """Check and print."""
        from tl_crosscoder.data.cache import ActivationCache
        from tl_crosscoder.report.sections import cache_sections
        from tl_crosscoder.results.render import as_text

        cache = ActivationCache(self.cache, verify=self.verify, show_progress=True)
        print(as_text(cache_sections(cache)))
