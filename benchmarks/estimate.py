"""What `tl_crosscoder.run.estimate` predicts beside what a harvest and a training run take.

    TQDM_DISABLE=1 python benchmarks/estimate.py             # about a minute
    TQDM_DISABLE=1 python benchmarks/estimate.py --tokens 50000 --device cuda

The embedded taboo pair, float32, at sizes of dictionary and k that differ; without AuxK but in the
first row, since how many latents are dead is not known beforehand. The last two columns are the
HARVEST_SHARE that would have been exact, and the time of the run over what was predicted. Times are
wall clock: on a busy machine they read long. Limit: models of width 96 only.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

from tl_crosscoder import RunConfig, Trainer, load_documents, preset, split_documents, tokenize
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.run.estimate import HARVEST_SHARE, Estimate, estimate
from tl_crosscoder.run.sources import load_source

CASES: tuple[dict[str, Any], ...] = (
    {},
    {"auxk_weight": 0.0},
    {"auxk_weight": 0.0, "expansion": 64, "preset": preset("batchtopk", k=32)},
    {"auxk_weight": 0.0, "expansion": 256, "preset": preset("batchtopk", k=32)},
    {"auxk_weight": 0.0, "kernels": "dense"},
    {"auxk_weight": 0.0, "preset": preset("delta", k=24), "batch_size": 4096},
)
COLUMNS = "harvest s", "predicted", "training s", "predicted", "exact share", "of predicted"


def run_config(n_tokens: int, device: str, **fields: Any) -> RunConfig:
    return RunConfig(
        base="tl_crosscoder/world-base",
        adapter="tl_crosscoder/taboo",
        hook_name="blocks.2.hook_resid_post",
        text="tl_crosscoder/taboo",
        output="unused",
        n_tokens=n_tokens,
        n_calibration_tokens=n_tokens // 10,
        device=device,
        **fields,
    )


def texts(config: RunConfig, tokenizer: Any) -> list[Any]:
    """(training, held-out) contexts, as many as the run asks for."""
    documents = load_documents("tl_crosscoder/taboo", max_documents=config.n_tokens // 8)
    sizes = config.n_tokens, config.n_calibration_tokens
    whole = [
        tokenize(d, tokenizer, context_size=config.context_size) for d in split_documents(documents)
    ]
    return [t[: -(-n // config.context_size) + 1] for t, n in zip(whole, sizes, strict=True)]


def seconds(act: Callable[[], Any]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def predicted(found: Estimate, config: RunConfig, n_tokens: int) -> tuple[float, float]:
    """Of a harvest of so many tokens, and of a training run with its calibration."""
    if found.seconds is None:
        raise SystemExit(f"device {config.device} is not here: there is nothing to compare.")
    by_token = found.seconds["harvest"] / found.n_tokens
    steps = sum(found.seconds.values()) - found.seconds["harvest"]
    return by_token * n_tokens, by_token * (config.n_tokens + config.n_calibration_tokens) + steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    plain = run_config(arguments.tokens, arguments.device)
    pair = load_source(plain)
    text, held_out = texts(plain, pair.tokenizer)
    list(harvest_rows(pair, text[:32]))  # what runs once, runs here
    print(f"{'':<72}" + "".join(f"{c:>13}" for c in COLUMNS))
    for fields in CASES:
        config = run_config(arguments.tokens, arguments.device, **fields)
        harvest, training = predicted(estimate(config), config, text.n_tokens)
        took = seconds(lambda: sum(len(rows) for rows in harvest_rows(pair, text)))
        trainer = Trainer(pair, text, held_out, config=config, recipe=config.preset)
        trained = seconds(trainer.fit)
        numbers = took, harvest, trained, training, HARVEST_SHARE * harvest / took
        cells = "".join(f"{n:>13.2f}" for n in (*numbers, trained / training))
        print(f"{fields or 'defaults'!s:<72}{cells}", flush=True)


if __name__ == "__main__":
    main()
