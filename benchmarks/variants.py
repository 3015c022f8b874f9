"""What the benchmarks of recipes compare: every preset, and Delta and Structured taken apart.

A variant is a choice of the fields of `RunConfig` that say what a dictionary is made of. Delta's
components, each alone: `dual-k` is `delta` at weight 0, `delta-competing` is `delta` without
Dual-K. Under the relative scale 0.005 is far weaker than under the absolute one, so that 0.5
stands beside it; `delta-weight-1` is as strong as Structured. L1 shrinks its codes the more the
fewer it has: `l1-twice-l0` is a second point of it. Limit: one choice of k.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_crosscoder.config.presets import PRESETS, preset_from
from tl_crosscoder.config.training import RunConfig

PENALISED = ("l1", "jumprelu", "dsf")
"""Presets whose L0 follows from a coefficient instead of a k."""

L0_MULTIPLES = {"l1-twice-l0": 2}
"""Factor of the k that all other variants have."""

RESULTS = Path(__file__).parent / "results"
VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in PRESETS},
    "l1-twice-l0": {"name": "l1"},
    "delta-unmasked": {"name": "delta", "delta_loss_masked": False},
    "delta-relative": {"name": "delta", "delta_loss_scale": "relative"},
    "delta-relative-0.5": {
        "name": "delta",
        "delta_loss_scale": "relative",
        "delta_loss_weight": 0.5,
    },
    "delta-weight-1": {"name": "delta", "delta_loss_weight": 1.0},
    "structured-competing": {"name": "structured", "dual_k": False},
    "structured-weight-0": {"name": "structured", "delta_loss_weight": 0.0},
}


def is_penalised(variant: str) -> bool:
    """Whether the variant needs a coefficient."""
    return VARIANTS[variant]["name"] in PENALISED


def configured(
    config: RunConfig, variant: str, *, k: float, coefficient: float | None
) -> RunConfig:
    """The run with this variant's dictionary; `coefficient` is for the penalised ones."""
    sparsity = {"coefficient": coefficient} if is_penalised(variant) else {"k": k}
    return replace(config, preset=preset_from({**VARIANTS[variant], **sparsity}))


def add_arguments(parser: argparse.ArgumentParser, *, n_seeds: int) -> None:
    """The options that the benchmarks of variants have in common."""
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[*range(n_seeds)])
    parser.add_argument("--output", type=Path, help="JSON; by default a file in results/")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--quick", action="store_true", help="tiny and the first seed only")


def seeds(arguments: argparse.Namespace) -> list[int]:
    """Seeds to run."""
    return arguments.seeds[:1] if arguments.quick else arguments.seeds


def output_path(arguments: argparse.Namespace, name: str) -> Path | None:
    """Where rows go; a quick run keeps nothing unless it is told to."""
    return arguments.output or (None if arguments.quick else RESULTS / name)
