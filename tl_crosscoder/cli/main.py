"""The command line: verbs only, each a thin call of a Python function.

No torch is imported before a verb runs, so that `--help` answers at once. Bad input ends with one
paragraph on stderr and exit code 2, an interrupt with 130.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from tl_crosscoder import files
from tl_crosscoder.cli.analyze import Analyze
from tl_crosscoder.cli.benchmark import Benchmark
from tl_crosscoder.cli.causal import (
    Ablate,
    Attribute,
    Baselines,
    Changes,
    Curves,
    Null,
    Patch,
    Steer,
)
from tl_crosscoder.cli.data import Contrastive, Harvest, Inspect
from tl_crosscoder.cli.hub import Export, Import, List, Publish
from tl_crosscoder.cli.organisms import Organisms
from tl_crosscoder.cli.report import Handoff, Judge, Report, Serve
from tl_crosscoder.cli.scan import Scan
from tl_crosscoder.config.inputs import ContrastiveConfig
from tl_crosscoder.config.null import NullConfig, NullKind
from tl_crosscoder.config.scan import ScanConfig
from tl_crosscoder.config.training import HarvestConfig, RunConfig
from tl_crosscoder.progress import silenced


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Diff the embedded pair on a laptop and print what the fine-tune changed (in minutes)."""

    organism: str = "taboo"
    """Which fine-tune, of those that `organisms list` names."""
    output: str | None = None
    """Folder for the dictionary, the measures and the figure; must be new or empty. None is
    demo-output/ORGANISM."""
    seed: int = 0
    """Seed of weights and data."""
    n_tokens: int | None = None
    """Activation pairs to train on, by default 1,000,000, or 500,000 of SmolLM2-135M; fewer give a
    quicker look and find less."""
    resume: bool = False
    """Continue the run in the output folder from its last checkpoint."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.demo import run_demo
        from tl_crosscoder.report.figures import save_norm_figure

        how = {"seed": self.seed, "n_tokens": self.n_tokens, "resume": self.resume}
        output = files.user_path(self.output or f"demo-output/{self.organism}")
        found = run_demo(self.organism, output=str(output), **how)
        save_norm_figure(found.measurement, output)
        print(found)
        _print_outputs(output)


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a crosscoder on any pair, hook point and text, or on a cache, then measure it."""

    run: Annotated[RunConfig, tyro.conf.OmitArgPrefixes]
    config: str | None = None
    """YAML file of the same fields; flags win over it."""
    sweep: str | None = None
    """YAML list of what each of several runs changes: they share the activations, and each has a
    folder of its own in the output folder."""
    dry_run: bool = False
    """Print an estimate of download, memory, disk and FLOPs, and do nothing: not even download. Of
    a mesh (--data-parallel, --latent-parallel) it is what each process takes, and sends."""
    dry_tflops: float | None = None
    """With --dry-run: TFLOP/s of a device, to say how many hours a run takes."""
    dry_gb_s: float = 100.0
    """With --dry-run: GB/s that a device sends to others."""
    resume: bool = False
    """Continue the run in the output folder from its last checkpoint."""
    null: NullKind | None = None
    """Measure the noise floor too: train and measure again, on the base against a fine-tune of it
    on its own samples (`self`) or against itself (`identical`). See the verb `null`."""
    changes: bool = True
    """Look for what changed when the dictionary is measured, and print it first; about a minute of
    small models on two cores. It needs models that are loaded, and held-out text."""

    def __call__(self) -> None:
        """Run and print."""
        from tl_crosscoder.config.sweep import read_sweep

        configs = [self.run] if self.sweep is None else read_sweep(self.sweep, self.run)
        if self.dry_run:
            from tl_crosscoder.run.estimate import estimate

            texts = []
            for config in configs:
                found = estimate(config)
                texts.append(f"{config.output}\n{found}")
                if self.dry_tflops is not None:
                    hours = found.hours(tflops=self.dry_tflops, gb_s=self.dry_gb_s)
                    rates = f"{self.dry_tflops:g} TFLOP/s and {self.dry_gb_s:g} GB/s a device"
                    texts[-1] += f"\nhours: {hours:,.1f} at {rates}"
            print(*texts, sep="\n\n")
            return
        from tl_crosscoder.report import sections
        from tl_crosscoder.report.answer import with_answer
        from tl_crosscoder.report.figures import save_norm_figure, save_scan_figure
        from tl_crosscoder.run.changes import answer_run
        from tl_crosscoder.run.null import check_fine_tuned, null_run
        from tl_crosscoder.run.training import train_all

        for config in configs if self.null == "self" else ():
            check_fine_tuned(config)
        for run in train_all(configs, resume=self.resume):
            if self.changes:
                answer_run(run)
            save_norm_figure(run.measurement(), run.path)
            save_scan_figure(run.path)
            if len(configs) > 1:
                print(f"\n=== {run.path.name} ===\n")
            if self.null is not None:
                null_run(run, NullConfig(kind=self.null), resume=self.resume)
            numbers = sections.render(run.measurement(), run.crosscoder.sites)
            print(with_answer(run.path, numbers))
            _print_outputs(run.path)


VERBS: dict[str, Any] = {
    "demo": Demo,
    "scan": Scan,
    "train": Train,
    "harvest": Harvest,
    "inspect": Inspect,
    "contrastive": Contrastive,
    "analyze": Analyze,
    "changes": Changes,
    "attribute": Attribute,
    "null": Null,
    "patch": Patch,
    "ablate": Ablate,
    "steer": Steer,
    "curves": Curves,
    "baselines": Baselines,
    "report": Report,
    "serve": Serve,
    "list": List,
    "export": Export,
    "import": Import,
    "publish": Publish,
    "handoff": Handoff,
    "judge": Judge,
    "organisms": Organisms,
    "benchmark": Benchmark,
}
"""In the order of work, which is that of the help and of the README."""
CONFIGS: dict[Any, Any] = {
    Scan: ScanConfig,
    Train: RunConfig,
    Harvest: HarvestConfig,
    Contrastive: ContrastiveConfig,
}
"""Verbs that take a --config file, and of what."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    if args == ["--version"]:
        print(f"tl_crosscoder {version('tl_crosscoder')}")
        return 0
    is_quiet = "--quiet" in args
    try:
        verb = parse([arg for arg in args if arg != "--quiet"])
        _quieten()
        with silenced(is_quiet):
            verb()
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or 'interrupted.'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; nothing is left to flush to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, FloatingPointError) as error:
        if os.environ.get("TL_CROSSCODER_TRACEBACK"):
            raise
        print(f"error{_of_process()}: {error}", file=sys.stderr)
        return 2
    return 0


def _of_process() -> str:
    """Which of several processes this is, for a message."""
    n = os.environ.get("WORLD_SIZE", "1")
    return "" if n == "1" else f" (process {os.environ.get('RANK')} of {n})"


def parse(args: Sequence[str]) -> Callable[[], None]:
    """The verb with its fields; prints help or a usage error and exits where tyro does.

    Raises:
        ValueError, FileNotFoundError: a config file that cannot be used, or a bad value.
    """
    verbs = [
        Annotated[verb, tyro.conf.subcommand(name, default=_default(verb, name, args))]
        for name, verb in VERBS.items()
    ]
    any_verb: Any = Union[tuple(verbs)]  # noqa: UP007 (built at run time)
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return tyro.cli(
                any_verb,
                prog="tl-crosscoder",
                description="What did fine-tuning change inside this model?\n\nEvery command takes "
                "--quiet: no progress and no notes on stderr, but results, warnings and errors. "
                "--version says which version this is.",
                args=args,
                config=(
                    tyro.conf.OmitSubcommandPrefixes,
                    tyro.conf.OmitArgPrefixes,
                    tyro.conf.CascadeSubcommandArgs,  # `train delta --k 12 --output out`
                ),
            )
    except SystemExit as stop:
        if error := _error_of_settings(stop):
            raise error from None
        sys.stderr.write(printed.getvalue())
        raise


def _error_of_settings(stop: SystemExit) -> ValueError | None:
    """What settings refused; tyro puts it into a box, with an internal name before it."""
    wrapped = stop.__context__
    error = None if wrapped is None else wrapped.__context__
    is_of_settings = isinstance(getattr(wrapped, "arg", None), str)
    return error if is_of_settings and isinstance(error, ValueError) else None


def _default(verb: Any, name: str, args: Sequence[str]) -> Any:
    """A verb with the fields of its --config file filled in; the output stays required."""
    path = _config_path(args)
    if path is None or verb not in CONFIGS or name not in args[:1]:
        return tyro.MISSING_NONPROP
    default = {"output": tyro.MISSING_NONPROP}
    return verb(run=CONFIGS[verb].from_yaml(path, default=default), config=path)


def _config_path(args: Sequence[str]) -> str | None:
    for i, arg in enumerate(args):
        if arg == "--config" and i + 1 < len(args):
            return args[i + 1]
        if arg.startswith("--config="):
            return arg.removeprefix("--config=")
    return None


def _quieten() -> None:
    """Other libraries' bars and notices stay out of our output; set before they are imported.

    Waiting threads sleep: alone this costs nothing, and with another busy process on two cores
    it harvests 24,000 tokens/s where spinning threads manage 900.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _print_outputs(folder: Path) -> None:
    print(f"\nSaved in {folder}:")
    for path in sorted(p for p in folder.iterdir() if p.is_file()):
        print(f"  {path.name:<32} {path.stat().st_size / 1e3:8,.0f} kB")


if __name__ == "__main__":
    sys.exit(main())
