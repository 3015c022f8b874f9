"""Every recipe on the two embedded organisms: what it explains, and whether it finds the plant.

    TQDM_DISABLE=1 python benchmarks/presets_on_organisms.py     # both organisms, seed 0
    python benchmarks/presets_on_organisms.py --seeds 0 1 2 --organisms taboo
    python benchmarks/presets_on_organisms.py --resume           # go on after a kill

Rows are those of `variants.py`, settings those of `tl-crosscoder demo` but for the recipe. What
`train` does, with the models run once for all variants of an organism and seed (540 MB at half a
million tokens): seconds are those of training alone. Planted words are looked for twice, in the
latents of largest relative norm, and in those that add most to the difference: a recipe whose
delta latents write to the fine-tuned model alone has many of relative norm 1, which the first
ranking orders by activity alone. A diff-SAE has one site; its FVE is that of the difference.
Limit: one tiny base model.
"""

import argparse
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice, product
from typing import Any

import torch
from difference_parts import difference_parts
from result_file import Column, ResultFile, collect
from torch import Tensor
from variants import add_arguments, configured, output_path, seeds

from tl_crosscoder.analysis.examples import examples
from tl_crosscoder.analysis.latents import MIN_ACTIVE_TOKENS, Ranking, in_order, rank_latents
from tl_crosscoder.analysis.measurement import LatentSummary, Measurement, measure
from tl_crosscoder.config.presets import preset_to_dict
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.documents import load_documents, split_documents
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.loader import ActivationLoader
from tl_crosscoder.data.text import held_out_text, tokens_of
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.demo import demo_config
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.organisms.recovery import planted_recovery
from tl_crosscoder.organisms.suite import organism
from tl_crosscoder.train.presets import crosscoder_config
from tl_crosscoder.train.trainer import Trainer

ORGANISMS = ("taboo", "false-fact")
K = 12
COEFFICIENTS = {
    "taboo": {"l1": 7.5, "l1-twice-l0": 1.0, "jumprelu": 2.2, "dsf": 6.8},
    "false-fact": {"l1": 2.2, "l1-twice-l0": 0.95, "jumprelu": 2.35, "dsf": 7.0},
}
"""At which L0 is within 1 of 12 (of 24), read off runs of half a million tokens with seed 0. It is
higher in shorter runs: L1 at 7.5 has an L0 of 13 at 150,000 tokens on taboo, dsf at 8 one of 24."""
N_TOP = 10

COLUMNS = (
    Column(heading="variant", path="variant", spec="", align="<"),
    Column(heading="seed", path="seed", spec=".3g"),
    Column(heading="s", path="seconds", spec=".0f"),
    Column(heading="FVE b", path="reconstruction.fve.base"),
    Column(heading="ft", path="reconstruction.fve.finetuned"),
    Column(heading="diff", path="difference_fve"),
    Column(heading="ft-only", path="reconstruction.difference_fve_by_class.finetuned-only"),
    Column(heading="other", path="reconstruction.difference_fve_by_class.other"),
    Column(heading="shared", path="reconstruction.difference_fve_by_class.shared"),
    Column(heading="delta part", path="difference_fve_by_part.delta"),
    Column(heading="L0", path="reconstruction.l0", spec=".1f"),
    Column(heading="dead", path="reconstruction.dead_share", spec=".0%"),
    Column(heading="n ft-only", path="latents_per_class.finetuned-only", spec=".4g"),
    Column(heading="top R", path="top_relative_norm", spec=".2f"),
    Column(heading="words", path="recovery.n_words_found", spec=".3g"),
    Column(heading="in ctx", path="recovery.share_in_context", spec=".0%"),
    Column(heading="random", path="recovery.random_share_in_context", spec=".0%"),
    Column(heading="p", path="recovery.p_value", spec=".2f"),
    Column(heading="by diff", path="recovery_by_contribution.share_in_context", spec=".0%"),
    Column(heading="p", path="recovery_by_contribution.p_value", spec=".2f"),
)
"""FVE of both sites and of the difference, the latter also by class and by the part delta; planted
words found, top contexts with one against random latents, and the same for the latents that add
most to the difference."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What all variants of an organism and seed have in common."""

    models: ModelPair
    text: TokenizedText
    held_out: TokenizedText

    def source(self, config: RunConfig) -> ActivationSource:
        """What a variant is trained on."""
        return self.models.difference() if config.difference else self.models


def remember_activations_(models: ModelPair) -> None:
    """From now on the models run once for the same batch of contexts; all is kept in memory."""
    run, kept = models.site_activations, {}

    def site_activations(tokens: Tensor, sites: Any, *, dtype: torch.dtype = torch.float32) -> list:
        key = tokens.numpy().tobytes()
        if key not in kept:
            kept[key] = run(tokens, range(models.n_sites), dtype=dtype)
        return [kept[key][i] for i in sites]

    models.site_activations = site_activations


@lru_cache(maxsize=1)
def prepared(config: RunConfig) -> Prepared:
    """Models, text and activations of a run as `train` makes them, all harvested at once."""
    training, held_out = split_documents(
        load_documents(config.sources[0]), held_out=config.held_out, seed=config.seed
    )
    models = ModelPair.from_config(config)
    remember_activations_(models)
    text = tokens_of(config, training, models.tokenizer)
    held_out = held_out_text(config, held_out, models.tokenizer, n_tokens=config.n_measured_tokens)
    ready = Prepared(models=models, text=text, held_out=held_out)
    loader = ActivationLoader(
        models,
        text,
        batch_size=config.batch_size,
        buffer_contexts=config.buffer_contexts,
        harvest_batch_size=config.harvest_batch_size,
        seed=config.seed,
    )
    for _ in islice(loader.batches(), config.plan(d_model=models.d_model).n_steps):
        pass
    return ready


def with_top(measurement: Measurement, ranking: Ranking, ready: Prepared) -> Measurement:
    """A measurement with other top latents."""
    top = [
        LatentSummary(
            ranked=row,
            examples=examples(
                measurement.top_tokens, row.latent, ready.held_out, ready.models.tokenizer
            ),
        )
        for row in ranking.rows
    ]
    return replace(measurement, top=top)


def by_contribution(measurement: Measurement, contribution: Tensor) -> Ranking:
    """The latents that add most to the difference."""
    latents = measurement.latents
    added = contribution.masked_fill(latents.n_active < MIN_ACTIVE_TOKENS, -1)
    order = added.sort(descending=True, stable=True).indices[:N_TOP].tolist()
    return in_order(latents, [j for j in order if added[j] >= 0], order="contribution")


def recovery_of(measurement: Measurement, ready: Prepared, name: str) -> dict[str, Any]:
    """Planted words in the contexts of the top latents, as in the demo."""
    recovery = planted_recovery(
        measurement,
        ready.held_out,
        ready.models.tokenizer,
        planted_words=organism(name).planted_words,
    )
    return asdict(recovery) | {"n_words_found": sum(n > 0 for n in recovery.in_context.values())}


def measured(
    crosscoder: Crosscoder, config: RunConfig, ready: Prepared, name: str
) -> dict[str, Any]:
    """All numbers of one dictionary, on held-out text."""
    source = ready.source(config)
    measurement = measure(source, crosscoder, ready.held_out, n_top=N_TOP)
    parts = crosscoder_config(source, config, config.preset).placed_partitions()
    rows = harvest_rows(source, ready.held_out, batch_size=config.harvest_batch_size)
    by_part = difference_parts(crosscoder, rows, parts)
    reconstruction, is_pair = measurement.reconstruction, measurement.compared is not None
    contributing = by_contribution(measurement, by_part.contribution(crosscoder))
    by_norm = rank_latents(
        measurement.latents, n=N_TOP, by="relative_decoder_norm" if is_pair else "activity"
    )
    fve = reconstruction.difference_fve if is_pair else reconstruction.fve["difference"]
    top_norm = by_norm.rows[0].relative_decoder_norm if is_pair and by_norm.rows else None
    return {
        "reconstruction": asdict(reconstruction),
        "difference_fve": fve,
        **by_part.result(crosscoder, parts),
        "latents_per_class": measurement.class_counts if is_pair else None,
        "top_relative_norm": top_norm,
        "recovery": recovery_of(with_top(measurement, by_norm, ready), ready, name),
        "recovery_by_contribution": recovery_of(
            with_top(measurement, contributing, ready), ready, name
        ),
    }


def one_run(name: str, variant: str, base: RunConfig) -> dict[str, Any]:
    """Train and measure one variant."""
    ready = prepared(base)
    config = configured(base, variant, k=K, coefficient=COEFFICIENTS[name].get(variant))
    started = time.perf_counter()
    crosscoder = Trainer(
        ready.source(config), ready.text, ready.held_out, config=config, recipe=config.preset
    ).fit()
    return {
        "options": preset_to_dict(config.preset),
        "seconds": round(time.perf_counter() - started, 1),
        **measured(crosscoder, config, ready, name),
    }


def base_config(name: str, seed: int, arguments: argparse.Namespace) -> RunConfig:
    """The demo's run; `--quick` makes it tiny."""
    config = demo_config(name, output="unused", seed=seed, n_tokens=arguments.n_tokens)
    if not arguments.quick:
        return config
    small = {"d_sae": 64, "batch_size": 256, "n_tokens": 2048, "buffer_contexts": 16}
    return replace(
        config, **small, max_documents=300, n_measured_tokens=2048, n_calibration_tokens=2048
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--organisms", nargs="+", choices=ORGANISMS, default=ORGANISMS)
    parser.add_argument("--n-tokens", type=int, default=500_000, help="activation pairs a run")
    add_arguments(parser, n_seeds=1)
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    config = base_config(ORGANISMS[0], 0, arguments)
    names = ("hook_name", "d_sae", "n_tokens", "batch_size", "lr", "n_measured_tokens")
    settings = {n: getattr(config, n) for n in names} | {"k": K, "coefficients": COEFFICIENTS}
    results = ResultFile(
        output_path(arguments, "presets_on_organisms.json"), settings, resume=arguments.resume
    )

    def run(organism: str, seed: int, variant: str) -> dict[str, Any]:
        return one_run(organism, variant, base_config(organism, seed, arguments))

    for name in arguments.organisms:
        print(f"\n{name}: {organism(name).planted}")
        pairs = product(seeds(arguments), arguments.variants)
        keys = ({"organism": name, "seed": seed, "variant": v} for seed, v in pairs)
        collect(results, COLUMNS, keys, run)


if __name__ == "__main__":
    main()
