"""Do the top-ranked latents cause the planted behaviour? Organisms, seeds, controls.

    python benchmarks/causal_tests.py                       # trains what is not there, then tests
    python benchmarks/causal_tests.py --resume              # go on after a kill

For each dictionary: KL recovery of its latents, and sufficiency and necessity of the latents that
the package ranks first and of those of largest relative decoder norm (the Delta paper's choice),
each against 100 controls of each kind and 10 sets of latents of the same firing rate.
Dictionaries are those of `tl-crosscoder demo` but for the preset. Beside them, without a
dictionary: the mean difference at positions 1, 2 and over all (ADL) and two principal components
of differences, taken of neutral text.
Neutral text is held-out text of other sources than the fine-tune's. Limit: one tiny base model.
"""

import argparse
from dataclasses import asdict, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any

from result_file import ResultFile

from tl_crosscoder.analysis.latents import rank_latents
from tl_crosscoder.baselines.difference import activation_difference, difference_pca
from tl_crosscoder.config.presets import preset_from
from tl_crosscoder.demo import demo_config
from tl_crosscoder.interventions.behaviour import Behaviour
from tl_crosscoder.interventions.causal import causal_test
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.controls import gaussian_factors
from tl_crosscoder.interventions.patching import patching
from tl_crosscoder.interventions.trials import ControlSettings, run_trials
from tl_crosscoder.organisms import suite
from tl_crosscoder.run.causal import neutral_text
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train

ORGANISMS = ("taboo", "false-fact")
PRESETS: dict[str, dict[str, Any]] = {
    "batchtopk": {"name": "batchtopk"},
    "delta": {"name": "delta", "delta_loss_weight": 1.0},
}
NO_DICTIONARY = "no dictionary"
N_PROMPTS, N_MATCHED = 150, 10
N_BASELINE_TOKENS = 50_000
SIZES = {"score": (3, 10, 30), "R": (3, 30)}
"""Latents of a set; 3 by R is the choice of the Delta paper."""


def trained(organism: str, preset: str, seed: int, arguments: argparse.Namespace) -> Run:
    """The dictionary's run, trained where it is not there."""
    path = arguments.runs / f"{organism}-{preset}-{seed}"
    n_tokens = 4096 if arguments.quick else arguments.n_tokens
    config = demo_config(organism, output=str(path), seed=seed, n_tokens=n_tokens)
    if arguments.quick:
        config = replace(config, d_sae=64, batch_size=256, n_measured_tokens=4096,
                         max_documents=400, n_calibration_tokens=2048)  # fmt: skip
    train(replace(config, preset=preset_from({**PRESETS[preset], "k": 12})), resume=True)
    return Run(path=path)


@lru_cache(maxsize=1)
def behaviour_of(organism: str, tokenizer: Any) -> Behaviour:
    return Behaviour.from_file(suite.organism(organism).questions[0], tokenizer)


def one_run(organism: str, preset: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    run = trained(organism, preset, seed, arguments)
    latents = run.measurement().latents
    by = {"score": "score", "R": "relative_decoder_norm"}
    most = max(max(sizes) for sizes in SIZES.values())
    top = {name: rank_latents(latents, n=most, by=order).latents for name, order in by.items()}
    sets = {f"top {n} by {name}": ids[:n] for name, ids in top.items() for n in SIZES[name]}
    sets = {name: ids for name, ids in sets.items() if ids}
    settings = ControlSettings(
        n_random=5 if arguments.quick else arguments.n_random,
        n_matched=N_MATCHED,
        alphas=(1.0,),
        seed=seed,
    )
    given = (run.models, run.crosscoder)
    what = (behaviour_of(organism, run.models.tokenizer), neutral_text(run))
    how = {"latents": latents, "settings": settings, "show_progress": True}
    shifted = causal_test(*given, *what, sets=sets, tests=("necessity", "insert"), **how)
    few = {name: ids for name, ids in sets.items() if len(ids) == 3}
    steered = causal_test(*given, *what, sets=few, tests=("steer",), **how)
    prompts = run.prompts(run.documents())[:N_PROMPTS]
    patched = patching(*given, prompts, latents=latents, extra=sets, seed=seed, show_progress=True)
    rows = [asdict(r) for r in (*shifted.rows, *steered.rows)]
    return {
        "behaviour": {"base": shifted.rows[0].base, "finetuned": shifted.rows[0].finetuned,
                      "n_prompts": shifted.n_prompts},
        "candidates": patched.candidates,
        "causal": [{k: _json(v) for k, v in row.items()} for row in rows],
        "patching": [
            {k: _json(v) for k, v in asdict(r).items()} for r in patched.rows if r.group != "random"
        ],
    }  # fmt: skip


def no_dictionary(organism: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Causal tests of the mean difference (ADL) and of principal components of differences.

    On the text of a dictionary's run, so that rows compare.
    """
    run = trained(organism, "batchtopk", seed, arguments)
    ctx, effect = InterventionContext.of(run.models), behaviour_of(organism, run.models.tokenizer)
    neutral = neutral_text(run)
    others = [
        d
        for d in run.documents()
        if d.get("source") not in suite.organism(organism).planted_sources
    ]
    text = run.some(run.text(others), N_BASELINE_TOKENS)
    adl = activation_difference(ctx.models, text)
    pca = difference_pca(ctx.models, text, n_components=2)
    settings = ControlSettings(
        n_random=5 if arguments.quick else arguments.n_random, alphas=(0.5, 1.0), seed=seed
    )
    signed = replace(settings, alphas=(-1.0, -0.5, 0.5, 1.0))
    how = {"factors": gaussian_factors(ctx, neutral, settings.controls)}
    trials = [
        *(t for w in (1, 2, "mean") for t in adl.trials(ctx, w, settings=settings, **how)),
        *(t for w in (0, 1) for t in pca.trials(ctx, w, settings=signed, **how)),
    ]
    found = run_trials(ctx, effect, neutral, trials=trials, settings=settings)
    return {
        "behaviour": {
            "base": found.rows[0].base,
            "finetuned": found.rows[0].finetuned,
            "n_prompts": found.n_prompts,
        },
        "causal": [{k: _json(v) for k, v in asdict(r).items()} for r in found.rows],
    }


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and value != value else value


def _name(row: dict[str, Any]) -> str:
    strength = row["strength"]
    return row["latents"] if strength is None else f"{row['latents']} x {strength:g}"


def show(row: dict[str, Any]) -> str:
    """One dictionary as lines."""
    head = f"{row['organism']}, {row['preset']}, seed {row['seed']}: " + ", ".join(
        f"{k} {v:.3g}" for k, v in row["behaviour"].items()
    )
    lines = [head]
    for r in row["causal"]:
        lines.append(
            f"  {r['test']:<10} {_name(r):<26} {r['share']:+.3f} "
            f"[{r['share_low']:+.3f}, {r['share_high']:+.3f}]  {r['strongest']} "
            f"{r['control_mean']:+.3f} (95 % {r['control_high']:+.3f})  p {r['p_control']:.3f} "
            f"(Holm {r['p_control_holm']:.2f})  KL {r['off_target_kl']:.3f} "
            f"(control {r['control_off_target_kl']:.3f})  {r['flag']}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--organisms", nargs="+", choices=ORGANISMS, default=ORGANISMS)
    parser.add_argument("--presets", nargs="+", choices=(*PRESETS, NO_DICTIONARY))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-tokens", type=int, default=1_000_000)
    parser.add_argument("--n-random", type=int, default=100)
    parser.add_argument("--runs", type=Path, default=Path("causal-runs"), help="dictionaries")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/causal_tests.json"
    )
    parser.add_argument("--resume", action="store_true", help="keep the rows that are there")
    parser.add_argument("--quick", action="store_true", help="tiny and one row; keeps nothing")
    parser.set_defaults(presets=[*PRESETS, NO_DICTIONARY])
    arguments = parser.parse_args()
    settings = {"n_tokens": arguments.n_tokens, "n_random": arguments.n_random}
    output = None if arguments.quick else arguments.output
    results = ResultFile(output, settings, resume=arguments.resume)
    todo = list(product(arguments.presets, arguments.seeds, arguments.organisms))
    for preset, seed, organism in todo[:1] if arguments.quick else todo:
        key = {"organism": organism, "preset": preset, "seed": seed}
        row = results.find(key)
        if row is None:
            made = (
                no_dictionary(organism, seed, arguments)
                if preset == NO_DICTIONARY
                else one_run(organism, preset, seed, arguments)
            )
            row = {**key, **made}
            results.add(row)
        print(show(row), flush=True)


if __name__ == "__main__":
    main()
