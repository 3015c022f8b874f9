"""How often the demo finds what was planted where nothing was planted.

    python benchmarks/verdict_nulls.py            # 24 null runs
    python benchmarks/verdict_nulls.py --resume   # go on after a kill

A null pair is the base against a LoRA fine-tune of it, with rank and layers of the organism's: on
its own samples (`self`), or on the organism's text without what is about the planted behaviours
(`neutral`). The demo's dictionary is trained on it, and its changes and its ranking by attribution
are found, as in the demo. Then the demo's test asks for each planted behaviour whether the latents
of a change, or the first ten of the ranking, cause it

    null    on the null pair: every "found" is a false positive
    real    on the organism's own pair, which this dictionary never saw, by the ranking alone: no
            null in the strict sense, for the behaviour is there; it says what a verdict owes to the
            training

A behaviour in which the models of a pair do not differ is not found; one that would be but for the
size of the change is counted. Limit: one tiny base model.
"""

import argparse
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from result_file import ResultFile
from scipy.stats import binomtest

from tl_crosscoder import files
from tl_crosscoder.config.null import NullConfig
from tl_crosscoder.config.presets import preset_from
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.chat import encode_stream
from tl_crosscoder.data.documents import load_documents
from tl_crosscoder.demo import HARDLY, N_LATENTS, demo_config, latent_sets, verdicts_of
from tl_crosscoder.models.loading import load_trainable
from tl_crosscoder.models.lora import LoraTrained, TrainingText, lora_config, train_lora
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.results.tables import without_nan
from tl_crosscoder.run.changes import changes_run
from tl_crosscoder.run.own_samples import own_samples, prompt_documents, training_texts
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train

ORGANISMS = ("taboo", "false-fact")
PAIRS = ("self", "neutral")
PRESETS: dict[str, dict[str, Any]] = {
    "batchtopk": {"name": "batchtopk"},
    "delta": {"name": "delta", "delta_loss_weight": 1.0},
}


def config_of(
    name: str, preset: str, seed: int, output: Path, arguments: argparse.Namespace
) -> RunConfig:
    """The demo's settings, but for the preset and the number of tokens."""
    made = preset_from({**PRESETS[preset], "k": 12})
    config = demo_config(name, output=str(output), seed=seed, n_tokens=arguments.n_tokens)
    # As much text as these tokens need: all of it takes longer to read than they do to train on.
    n_documents = max(8_000, arguments.n_tokens // 25)
    config = replace(config, preset=made, n_measured_tokens=50_000, max_documents=n_documents)
    if not arguments.quick:
        return config
    return replace(config, d_sae=64, batch_size=256, n_measured_tokens=4096,
                   max_documents=400, n_calibration_tokens=2048)  # fmt: skip


def texts_of(
    models: ModelPair, name: str, pair: str, config: RunConfig, how: NullConfig
) -> list[TrainingText]:
    """What a neutral fine-tune learns."""
    if pair == "self":
        documents = prompt_documents(config, None, how.n_samples)
        return training_texts([*own_samples(models, documents, how, how=config)])
    planted = organism(name).planted_sources
    documents = load_documents(config.sources[0])
    neutral = [d for d in documents if d.get("source") not in planted]
    chosen = random.Random(how.seed).sample(neutral, min(how.n_samples, len(neutral)))
    rows = (encoded.ids.tolist() for encoded in encode_stream(chosen, models.tokenizer))
    return [TrainingText(ids=tuple(ids[: models.n_ctx]), n_prompt=1) for ids in rows]


def neutral_adapter(
    models: ModelPair, name: str, pair: str, seed: int, arguments: argparse.Namespace
) -> Path:
    """The folder of an adapter that was taught nothing, trained where it is not there."""
    folder = arguments.runs / f"{name}-{pair}-{seed}-adapter"
    if folder.is_dir():
        return folder
    how = NullConfig(seed=seed)
    if arguments.quick:
        how = replace(how, n_steps=2, n_samples=24, max_new_tokens=8)
    config = config_of(name, "batchtopk", seed, folder, arguments)
    base, finetuned = models.model_sites
    train_lora(
        load_trainable(base, device="cpu", dtype="float32"),
        texts_of(models, name, pair, config, how),
        folder,
        lora=lora_config(finetuned.adapter, rank=how.rank),
        how=how,
        base_name=base.model_name,
    )
    return folder


def on_real_pair(null: Run, models: ModelPair) -> Run:
    """The null's dictionary as a run on the organism's own pair, measured there."""
    folder = null.path.with_name(f"{null.path.name}-real")
    if not folder.exists():
        crosscoder = Crosscoder.load(null.path)
        crosscoder.rename_models_(models.sites)
        training = null.record["training"] | {"adapter": models.sites[1].adapter}
        sites = [site.to_dict() for site in crosscoder.sites]
        left_out = ("weights_sha256", "model_sha256")
        record = {k: v for k, v in null.record.items() if k not in left_out}
        with files.replacing(folder) as made:
            crosscoder.save(made)
            files.write_json(
                made / files.RECORD_NAME, record | {"training": training, "sites": sites}
            )
            held_out = (null.path / files.HELD_OUT_NAME).read_text(encoding="utf-8")
            files.write_text(made / files.HELD_OUT_NAME, held_out)
    run = Run(path=folder, loaded=models)
    if not (folder / files.ANALYSIS_NAMES[0]).is_file():
        run.measure()
    return run


def tested(run: Run, name: str) -> dict[str, Any]:
    """The demo's verdicts on one run, with what they rest on."""
    sets = latent_sets(run)
    verdicts = verdicts_of(run, sets, behaviours=organism(name).planted_questions)
    found = [asdict(verdict) | {"is_found": verdict.is_found} for verdict in verdicts]
    return {
        "n_changes": len(sets) - 1,
        "sets": sets,
        "fve": run.measurement().reconstruction.fve,
        "verdicts": without_nan(found),
    }


def one_cell(
    models: ModelPair, arguments: argparse.Namespace, *, organism: str, pair: str, preset: str,
    seed: int,
) -> dict[str, Any]:  # fmt: skip
    """One null run, and its dictionary on the organism's pair."""
    adapter = neutral_adapter(models, organism, pair, seed, arguments)
    output = arguments.runs / f"{organism}-{pair}-{preset}-{seed}"
    config = config_of(organism, preset, seed, output, arguments)
    null = train(replace(config, adapter=str(adapter)), resume=True)
    if not (null.path / files.CHANGES_NAME).is_file():
        changes_run(null)
    return {
        "trained": asdict(LoraTrained.load(adapter)),
        "null": tested(null, organism),
        "real": tested(on_real_pair(null, models), organism),
    }


def rate(found: Iterable[bool]) -> dict[str, Any]:
    """A share with its interval at 95 % (Clopper and Pearson 1934)."""
    each = [*found]
    low, high = binomtest(sum(each), len(each)).proportion_ci(0.95, method="exact")
    return {"n": len(each), "n_found": sum(each), "rate": sum(each) / len(each),
            "low": float(low), "high": float(high)}  # fmt: skip


def rates(rows: list[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rates over verdicts and over runs, of all rows and by kind of pair."""
    for on, pair in product(("null", "real"), ("all", *PAIRS)):
        own = [row[on]["verdicts"] for row in rows if pair in ("all", row["pair"])]
        if own:
            each = [v["is_found"] for verdicts in own for v in verdicts]
            by_run = [any(v["is_found"] for v in verdicts) for verdicts in own]
            flat = [v for verdicts in own for v in verdicts]
            counts = {"n_tested": sum(v["share"] is not None for v in flat),
                      "n_hardly": sum(v["reason"] == HARDLY for v in flat)}  # fmt: skip
            found = {"verdicts": rate(each), "runs": rate(by_run)}
            if on == "null":
                changed = [row[on]["n_changes"] > 0 for row in rows if pair in ("all", row["pair"])]
                found["changed"] = rate(changed)
            yield {"on": on, "pair": pair, **counts, **found}


def summary(entry: Mapping[str, Any]) -> str:
    """One line of what was found."""
    parts = [
        f"{r['n_found']} of {r['n']} {name} ({r['rate']:.1%} [{r['low']:.1%}, {r['high']:.1%}])"
        for name, what in (("verdicts", "verdicts"), ("runs", "runs"), ("have changes", "changed"))
        if (r := entry.get(what))
    ]
    return (
        f"{entry['on']} pair, {entry['pair']:<8} found in {', '.join(parts)}; "
        f"{entry['n_tested']} tested, {entry['n_hardly']} found but for the size of the change"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="null pairs of each kind")
    parser.add_argument("--n-tokens", type=int, default=200_000, help="of each dictionary")
    parser.add_argument("--runs", type=Path, default=Path("runs/verdict_nulls"))
    parser.add_argument("--resume", action="store_true", help="keep the cells that are there")
    parser.add_argument("--only", choices=ORGANISMS, help="pairs of one organism")
    parser.add_argument("--most", type=int, help="stop after so many cells")
    parser.add_argument("--quick", action="store_true", help="one tiny cell; nothing is kept")
    results = Path("benchmarks/results/verdict_nulls.json")
    parser.add_argument("--output", type=Path, default=results)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.n_tokens, arguments.most = 4096, 1
        arguments.runs = Path(tempfile.mkdtemp())
    settings = {"n_tokens": arguments.n_tokens, "n_latents": N_LATENTS}
    path = None if arguments.quick else arguments.output
    file = ResultFile(path, settings, resume=arguments.resume)
    torch.manual_seed(0)
    n_done = 0
    cells = product(range(arguments.seeds), PRESETS, PAIRS, ORGANISMS)
    for seed, preset, pair, name in cells:
        key = {"organism": name, "pair": pair, "preset": preset, "seed": seed}
        if file.find(key) is not None or n_done == arguments.most:
            continue
        if arguments.only not in (None, name):
            continue
        hook_name = demo_config(name, output="").hook_name or ""
        models = ModelPair.from_pretrained(
            "tl_crosscoder/world-base", adapter=f"tl_crosscoder/{name}", hook_name=hook_name
        )
        row = key | one_cell(models, arguments, **key)
        file.content["rates"] = [*rates([*file.rows, row])]
        file.add(row)
        n_done += 1
        found = {on: sum(v["is_found"] for v in row[on]["verdicts"]) for on in ("null", "real")}
        print(f"{' '.join(map(str, key.values())):<32} found: {found}", flush=True)
    print(*map(summary, file.content.get("rates", ())), sep="\n")


if __name__ == "__main__":
    main()
