"""What the benchmarks of recipes compare: every preset, and Delta and Structured taken apart.

A variant is a choice of the fields of `RunConfig` that say what a dictionary is made of. Delta's
components, each alone: `dual-k` is `delta` at weight 0, `delta-competing` is `delta` without
Dual-K. Under the relative scale 0.005 is far weaker than under the absolute one, so that 0.5
stands beside it; `delta, weight 1` is as strong as Structured. Limit: one choice of k.
"""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_crosscoder.presets import PRESETS
from tl_crosscoder.train.config import RunConfig

PENALISED = {"l1": "l1_coefficient", "jumprelu": "jumprelu_coefficient", "dsf": "l1_coefficient"}
"""Presets whose L0 follows from a coefficient instead of a k, with its field."""

RESULTS = Path(__file__).parent / "results"

VARIANTS: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in PRESETS},
    "delta, unmasked": {"preset": "delta", "delta_loss_masked": False},
    "delta, relative": {"preset": "delta", "delta_loss_scale": "relative"},
    "delta, relative 0.5": {
        "preset": "delta",
        "delta_loss_scale": "relative",
        "delta_loss_weight": 0.5,
    },
    "delta, weight 1": {"preset": "delta", "delta_loss_weight": 1.0},
    "structured, competing": {"preset": "structured", "dual_k": False},
    "structured, weight 0": {"preset": "structured", "delta_loss_weight": 0.0},
}


def configured(
    config: RunConfig, variant: str, *, k: float, coefficient: float | None = None
) -> RunConfig:
    """The run with this variant's dictionary; `coefficient` is for the penalised presets."""
    fields = VARIANTS[variant]
    field = PENALISED.get(fields["preset"])
    sparsity = {field: coefficient} if field else {"k": k}
    return replace(config, **({"k": None} | sparsity | fields))


def add_arguments(parser: argparse.ArgumentParser, *, seeds: list[int]) -> None:
    """The options that the benchmarks of variants have in common."""
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds)
    parser.add_argument("--output", type=Path, help="JSON; by default a file in results/")
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it runs")


def output_path(arguments: argparse.Namespace, name: str) -> Path | None:
    """Where rows go; a quick run keeps nothing unless it is told to."""
    return arguments.output or (None if arguments.quick else RESULTS / name)
