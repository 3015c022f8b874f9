"""How fast a crosscoder learns from each start, and how many latents die: the choice of defaults.

    python benchmarks/learning_start.py                            # the embedded pair
    python benchmarks/learning_start.py --name smollm2 --base SMOLLM2-135M --random-adapter \
        --hook-name blocks.6.hook_resid_post --text wikitext-2 --n-tokens 300000

Each start is a whole run of `train` with the settings of `tl-crosscoder train`; read are its own
metrics. `least_squares` is the default, `transposed` the papers' start (Minder et al. 2025), each
with and without AuxK. `--random-adapter` makes a fine-tune on the spot, a LoRA of random weights:
what is measured is learning from activations of a real model, not what a fine-tune is about. Rows
are kept as they come, and those that are there are not made again. Limit: one seed unless more are
named.
"""

import argparse
import json
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from result_file import Column, ResultFile, collect
from transformers import AutoModelForCausalLM

from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.demo import demo_config
from tl_crosscoder.models.pretrained import resolve_model
from tl_crosscoder.run.training import train

RESULTS = Path(__file__).parent / "results" / "learning_start.json"
STARTS = ("least_squares", "transposed")
AT_STEPS = (50, 100, 200)
LOG_EVERY = 10
"""Steps between two lines of metrics, so that the first hundred are seen."""
B_STD = 0.02
"""Standard deviation of the random adapter's second factor."""
COLUMNS = (
    Column(heading="start", path="start", spec="s", align="<"),
    Column(heading="AuxK", path="auxk_weight"),
    *(Column(heading=f"FVE at {step}", path=f"fve_at_{step}") for step in AT_STEPS),
    Column(heading="tokens to .8", path="tokens_to_80", spec=",.0f"),
    Column(heading="FVE", path="fve"),
    Column(heading="difference", path="difference_fve"),
    Column(heading="dead", path="dead_share", spec=".1%"),
    Column(heading="most dead", path="most_dead", spec=".1%"),
    Column(heading="AuxK's FVE", path="auxk_fve"),
)


def random_adapter(base: str, folder: Path) -> str:
    """A LoRA of random weights on the matrices that write to the stream."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["v_proj", "o_proj", "down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, B_STD)
    adapted.save_pretrained(folder)
    return str(folder)


def first(name: str, lines: Iterable[dict[str, Any]]) -> Any:
    """A field of the first line; None without any."""
    return next((line[name] for line in lines), None)


def row_of(config: RunConfig) -> dict[str, Any]:
    """Train once: FVE of the worse site on the way, and how it ended."""
    run = train(config)
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    lines = [m | {"fve": min(m["fve/base"], m["fve/finetuned"])} for m in lines]
    last, measured = lines[-1], run.measurement().reconstruction
    return {
        **{f"fve_at_{n}": first("fve", (m for m in lines if m["step"] >= n)) for n in AT_STEPS},
        "tokens_to_80": first("n_tokens", (m for m in lines if m["fve"] >= 0.8)),
        "n_tokens": last["n_tokens"],
        "fve": min(measured.fve.values()),
        "difference_fve": measured.difference_fve,
        "dead_share": last["dead_share"],
        "most_dead": max(m["dead_share"] for m in lines),
        "auxk_fve": last.get("auxk_fve"),
        "d_sae": run.crosscoder.cfg.d_sae,
    }


def config_of(arguments: argparse.Namespace, folder: Path) -> RunConfig:
    """Models and text of all runs: an embedded organism, or what the command line names."""
    if arguments.base is None:
        return demo_config("taboo", output=str(folder), n_tokens=arguments.n_tokens)
    base = str(resolve_model(arguments.base))
    adapter = random_adapter(base, folder / "adapter") if arguments.random_adapter else None
    return RunConfig(
        base=base,
        adapter=adapter or arguments.adapter,
        hook_name=arguments.hook_name,
        text=arguments.text,
        n_tokens=arguments.n_tokens,
        max_documents=arguments.max_documents,
        output=str(folder),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="taboo", help="of the pair, in the table")
    parser.add_argument("--base", help="folder or name of a model; else the embedded pair")
    parser.add_argument("--adapter", help="LoRA on it")
    parser.add_argument("--random-adapter", action="store_true", help="make one of random weights")
    parser.add_argument("--hook-name", default="blocks.2.hook_resid_post")
    parser.add_argument("--text", help="file, folder or `datasets` name")
    parser.add_argument("--max-documents", type=int)
    parser.add_argument("--n-tokens", type=int, default=300_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--auxk-weights", type=float, nargs="+", default=[1 / 32, 0.0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    keys = [
        {"pair": arguments.name, "n_tokens_asked": arguments.n_tokens, "seed": seed}
        | {"start": start, "auxk_weight": weight}
        for seed in arguments.seeds
        for weight in arguments.auxk_weights
        for start in arguments.starts
    ]
    results = ResultFile(arguments.output, {}, resume=True)
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(arguments, Path(folder))

        def run(**key: Any) -> dict[str, Any]:
            output = Path(folder) / f"{key['start']}-{key['auxk_weight']:.3f}-{key['seed']}"
            changes = {"encoder_init": key["start"], "auxk_weight": key["auxk_weight"]}
            changes |= {"seed": key["seed"], "output": str(output), "log_every": LOG_EVERY}
            return row_of(replace(config, **changes))

        collect(results, COLUMNS, keys, run)


if __name__ == "__main__":
    main()
