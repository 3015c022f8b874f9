"""Harvest, cache and loader beside the bare forward passes and SAELens's store, in one run.

    TQDM_DISABLE=1 python benchmarks/data_path.py            # all parts, about six minutes
    python benchmarks/data_path.py --parts harvest reading   # some of them

Harvest: tokens a second through both models to the hook's layer, on all cores; *bare* is
`model(tokens, stop_at_layer=...)` of each, which keeps nothing. Rows take turns (A B C A B C ...),
so that a drift of the machine meets all alike; medians. Pairs: the embedded one (bridge, 96 wide),
and random weights 512 wide as a bridge and as a HookedTransformer: speed does not depend on them.
Reading: rows of a cache on one core, 2 x 512. Sweep: four runs of the command line against one
`--sweep`, start-up included. Limit: CPU; what was just written is in the page cache.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from datasets import Dataset
from sae_lens.training.activations_store import ActivationsStore
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tl_crosscoder import ActivationCache, ModelPair, TokenizedText, files, load_documents, tokenize
from tl_crosscoder.data.cache_writer import write_cache
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.loader import ActivationLoader
from tl_crosscoder.models.hooked import last_stop_layer
from tl_crosscoder.models.pretrained import pretrained_folder
from tl_crosscoder.models.saelens import PairView

RESULTS = Path(__file__).parent / "results" / "data_path.json"
PARTS = ("harvest", "reading", "sweep")
HOOK = "blocks.2.hook_resid_post"
CONTEXT, BATCH = 128, 32
D_MODEL, N_LAYERS, D_VOCAB = 512, 6, 1504
STORES = ("float32", "bfloat16", "float16", "int8")


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    n_contexts: int = 128
    n_rounds: int = 5
    n_reads: int = 20
    n_pairs: int = 4096
    """Rows of a read."""
    n_runs: int = 4
    """In the sweep."""
    sweep_tokens: int = 400_000
    d_model: int = D_MODEL


QUICK = Size(
    n_contexts=16, n_rounds=1, n_reads=2, n_pairs=256, n_runs=1, sweep_tokens=4096, d_model=64
)


def embedded_pair() -> ModelPair:
    names = {"adapter": "tl_crosscoder/taboo", "hook_name": HOOK}
    return ModelPair.from_pretrained("tl_crosscoder/world-base", **names)


def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(pretrained_folder() / "models/world-base")


def bridge_pair(folder: Path, d_model: int, *, device: str = "cpu") -> ModelPair:
    """Two random Llamas through `TransformerBridge`."""
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=8 * d_model // 3,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=8,
        vocab_size=D_VOCAB,
        max_position_embeddings=256,
    )
    for seed in (0, 1):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder / str(seed))
        tokenizer().save_pretrained(folder / str(seed))
    return ModelPair.from_pretrained(folder / "0", folder / "1", hook_name=HOOK, device=device)


def hooked_pair(d_model: int) -> ModelPair:
    """A pair of the same width and depth, as `HookedTransformer`."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    models = []
    for seed in (0, 1):
        config = HookedTransformerConfig(
            n_layers=N_LAYERS,
            d_model=d_model,
            n_ctx=256,
            d_head=d_model // 8,
            n_heads=8,
            d_mlp=4 * d_model,
            d_vocab=D_VOCAB,
            act_fn="gelu",
            normalization_type="RMS",
            seed=seed,
        )
        models.append(HookedTransformer(config, tokenizer=tokenizer()))
    return ModelPair(*models, hook_name=HOOK, tokenizer=tokenizer())


def text_of(pair: ModelPair, n_contexts: int) -> TokenizedText:
    documents = load_documents("tl_crosscoder/taboo", max_documents=8 * n_contexts)
    return tokenize(documents, pair.tokenizer, context_size=CONTEXT)[:n_contexts]


# --- harvest --------------------------------------------------------------------------------------


@torch.no_grad()
def bare(pair: ModelPair, text: TokenizedText) -> int:
    for tokens in text.tokens.long().to(pair.device).split(BATCH):
        for model in pair.models:
            model(tokens, stop_at_layer=last_stop_layer([s.hook_name for s in pair.sites]))
    return text.tokens.numel()


def harvested(pair: ModelPair, text: TokenizedText) -> int:
    for rows in harvest_rows(pair, text, batch_size=BATCH):
        del rows
    return text.tokens.numel()


def live_loader(pair: ModelPair, text: TokenizedText) -> int:
    """One pass over the text, dealt in batches."""
    loader = ActivationLoader(
        pair, text, batch_size=1024, buffer_contexts=len(text) // 2, harvest_batch_size=BATCH
    )
    buffers = loader._order(0).split(loader.buffer_contexts)
    n_batches = sum(text[contexts].n_tokens // loader.batch_size for contexts in buffers)
    for _ in islice(loader.batches(), n_batches):
        pass
    return text.tokens.numel()


def cached(pair: ModelPair, text: TokenizedText) -> int:
    """Written to disk in bfloat16, with statistics and hashes."""
    with tempfile.TemporaryDirectory() as folder:
        n_held_out = len(text) // 8
        parts = text[n_held_out:], text[:n_held_out]
        write_cache(pair, *parts, Path(folder) / "c", batch_size=BATCH, show_progress=False)
    return text.tokens.numel()


def saelens_store(pair: ModelPair, text: TokenizedText) -> int:
    """The batches that SAELens's store deals of the same contexts, through the pair's view.

    Its mixing buffer holds a sixth of the tokens of a round, and half of it is filled first.
    """
    n_tokens = text.tokens.numel()
    store = ActivationsStore(
        model=PairView(pair),
        dataset=Dataset.from_dict({"tokens": text.tokens.tolist()}),
        streaming=False,
        hook_name="hook_sites",
        hook_head_index=None,
        context_size=CONTEXT,
        d_in=pair.d_in,
        n_batches_in_buffer=2 * BATCH,
        total_training_tokens=n_tokens,
        store_batch_size_prompts=BATCH,
        train_batch_size_tokens=1024,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    return sum(len(batch) for batch in islice(store.get_data_loader(), n_tokens // 1024))


HARVESTS: dict[str, Callable[[ModelPair, TokenizedText], int]] = {
    "bare": bare,
    "harvest": harvested,
    "live loader": live_loader,
    "cache, written": cached,
    "SAELens store": saelens_store,
}


def measure_harvest(size: Size, folder: Path) -> list[dict[str, Any]]:
    pairs = {
        "embedded, bridge": lambda: embedded_pair(),
        "512 wide, bridge": lambda: bridge_pair(folder, size.d_model),
        "512 wide, HookedTransformer": lambda: hooked_pair(size.d_model),
    }
    results = []
    for name, make in pairs.items():
        pair = make()
        text = text_of(pair, size.n_contexts * (1 if "wide" in name else 3))
        speeds: dict[str, list[float]] = {row: [] for row in HARVESTS}
        for i in range(size.n_rounds + 1):
            for row, run in HARVESTS.items():
                started = time.perf_counter()
                n = run(pair, text)
                if i or size.n_rounds == 1:  # the first round warms up
                    speeds[row].append(n / (time.perf_counter() - started))
        medians = {row: median(values) for row, values in speeds.items()}
        results.append(
            {
                "pair": name,
                "tokens_per_s": medians,
                "of_bare": {row: v / medians["bare"] for row, v in medians.items()},
            }
        )
        print(name, *(f"{r} {v:,.0f} ({v / medians['bare']:.2f})" for r, v in medians.items()))
    return results


# --- reading --------------------------------------------------------------------------------------


class OneRowAtATime(torch.utils.data.Dataset):
    """How public loaders read: a row for each index, put together by torch's DataLoader."""

    def __init__(self, cache: ActivationCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return self.cache.n_rows

    def __getitem__(self, index: int) -> torch.Tensor:
        shard = int(torch.searchsorted(self.cache._first_rows, index, right=True)) - 1
        row = index - int(self.cache._first_rows[shard])
        return self.cache._stored[shard]["rows"][row].float()


def random_reads(cache: ActivationCache, size: Size) -> float:
    generator = torch.Generator().manual_seed(0)
    indices = [
        torch.randint(cache.n_rows, (size.n_pairs,), generator=generator)
        for _ in range(size.n_reads)
    ]
    return _speed(lambda: sum(len(cache.read(index)) for index in indices))


def cached_loader(cache: ActivationCache, size: Size, *, prefetch: int) -> float:
    loader = ActivationLoader(
        cache,
        cache.training,
        batch_size=min(size.n_pairs, cache.training.n_tokens // 2),
        buffer_contexts=256,
        prefetch=prefetch,
    )

    def run() -> int:
        with closing(loader.batches()) as batches:
            return sum(len(batch) for batch, _ in islice(batches, size.n_reads))

    return _speed(run)


def one_row_at_a_time(cache: ActivationCache, size: Size) -> float:
    torch.manual_seed(0)
    loader = DataLoader(OneRowAtATime(cache), batch_size=size.n_pairs, shuffle=True)
    return _speed(lambda: sum(len(batch) for batch in islice(loader, max(1, size.n_reads // 5))))


def _speed(run: Callable[[], int], n_rounds: int = 3) -> float:
    """Median rows a second."""
    speeds = []
    for _ in range(n_rounds):
        started = time.perf_counter()
        speeds.append(run() / (time.perf_counter() - started))
    return median(speeds)


def measure_reading(size: Size, folder: Path) -> list[dict[str, Any]]:
    pair = bridge_pair(folder, size.d_model)
    text = text_of(pair, 4 * size.n_contexts)
    n_held_out = len(text) // 8
    parts = text[n_held_out:], text[:n_held_out]
    results = []
    n_threads = torch.get_num_threads()
    for store in STORES:
        cache = write_cache(
            pair, *parts, folder / store, store=store, shard_tokens=16_384, show_progress=False
        )
        torch.set_num_threads(1)
        row = {
            "store": store,
            "n_rows": cache.n_rows,
            "bytes_per_token": cache.n_bytes / cache.n_rows,
            "storage_error": cache.manifest["storage_error"],
            "random_pairs_per_s": random_reads(cache, size),
            "loader_per_s": cached_loader(cache, size, prefetch=0),
            "one_row_at_a_time_per_s": one_row_at_a_time(cache, size),
        }
        torch.set_num_threads(n_threads)
        results.append(row)
        print({k: f"{v:,.0f}" if isinstance(v, float) else v for k, v in row.items()})
    return results


# --- sweep ----------------------------------------------------------------------------------------

CHANGES = [{"preset": {"name": name, "k": 12}} for name in ("batchtopk", "topk", "dual-k", "delta")]


def measure_sweep(size: Size, folder: Path) -> dict[str, Any]:
    changes = CHANGES[: size.n_runs]
    run = {
        "base": "tl_crosscoder/world-base", "adapter": "tl_crosscoder/taboo", "hook_name": HOOK,
        "text": "tl_crosscoder/taboo", "d_sae": 1024, "n_tokens": size.sweep_tokens,
        "max_documents": 10_000 if size.sweep_tokens > 10_000 else 400,
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(changes))
    command = [sys.executable, "-m", "tl_crosscoder.cli.main", "train"]
    command += ["--config", str(folder / "run.yaml")]
    alone = []
    for i, change in enumerate(changes):
        flags = ["--output", str(folder / f"alone-{i}"), change["preset"]["name"], "--k", "12"]
        alone.append(_seconds([*command, *flags]))
    sweep = ["--sweep", str(folder / "sweep.yaml"), "--output", str(folder / "sweep")]
    together = _seconds([*command, *sweep])
    share = together / sum(alone)
    print(f"{len(alone)} runs {sum(alone):.1f} s, one sweep {together:.1f} s: {share:.2f}")
    return {"n_tokens": size.sweep_tokens, "alone_s": alone, "sweep_s": together, "share": share}


def _seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def parts_of(names: list[str], size: Size) -> Iterator[tuple[str, Any]]:
    measures = {"harvest": measure_harvest, "reading": measure_reading, "sweep": measure_sweep}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            yield name, measures[name](size, Path(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="tiny: to see that it runs")
    arguments = parser.parse_args()
    size = QUICK if arguments.quick else Size()
    results = {"n_threads": torch.get_num_threads(), "is_quick": arguments.quick}
    for name, result in parts_of(arguments.parts, size):
        results[name] = result
    files.write_json(arguments.output, results)


if __name__ == "__main__":
    main()
