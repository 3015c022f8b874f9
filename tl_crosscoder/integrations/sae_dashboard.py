"""Dashboards of latents as SAEDashboard writes them: `batch-0.json`, `batch-1.json`, ...

Contract: the fields of `NeuronpediaDashboardBatch`, `NeuronpediaDashboardFeature` and
`NeuronpediaDashboardActivation` of sae-dashboard 0.8.0 (`neuronpedia/neuronpedia_dashboard.py`),
which its loaders and Neuronpedia's converter read; and `skipped_indexes.json` for silent latents.
Histograms and intervals are counted over the whole text; examples are those of the run's database.
Limits: logits are centred over the vocabulary, with the final norm's scale (see `analysis.lens`),
where SAEDashboard takes the bare product; tables of correlated neurons and features stay empty, as
its converter leaves them where there are none.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.analysis.example_database import ExampleDatabase, StoredExample
from tl_crosscoder.analysis.firing import ActiveTokens
from tl_crosscoder.analysis.lens import Readout
from tl_crosscoder.integrations.shown_site import ShownSite
from tl_crosscoder.models.tokenizer import token_text

N_BINS = 50
"""Bars of a histogram, as in SAEDashboard."""
N_INTERVALS = 5
"""Equal parts of the range of codes by which examples are grouped, as in its runner."""
N_LOGITS = 10
_EMPTY: dict[str, list[Any]] = {
    name: []
    for name in (
        "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
        "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
        "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
        "decoder_weights_dist",
    )
}  # fmt: skip
Feature = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DashboardNames:
    """What the dashboards are filed under."""

    model_id: str
    """The model's name there, such as `gemma-2-2b-it`."""
    layer: int
    sae_set: str
    """Name of the set of dictionaries, such as `crosscoder-res-16k`."""
    dataset: str = ""
    """The text they were made on."""


@torch.no_grad()
def dashboard_batches(
    shown: ShownSite,
    active: ActiveTokens,
    examples: ExampleDatabase,
    *,
    names: DashboardNames,
    latents: Sequence[int],
    n_per_batch: int = 128,
) -> Iterator[list[Feature]]:
    """Dashboards of latents, a batch at a time.

    Args:
        shown: the model whose logits and directions are shown.
        active: of the text that the examples are from.
        examples: of the run.
        names: for the field `dataset`.
        latents: which.
        n_per_batch: latents a batch.

    Raises:
        ValueError: the hook is not on the residual stream, or the model has no unembedding.
    """
    readout = Readout.of(shown.model, d_vocab=shown.n_vocab)
    for start in range(0, len(latents), n_per_batch):
        ids = list(latents[start : start + n_per_batch])
        logits = readout.logits(shown.decoder[ids]).float().cpu()
        yield [
            {
                **_EMPTY,
                "feature_index": j,
                **_logits(own, shown),
                **_activity(active, j, examples.latent(j)),
                "n_prompts_total": len(active.counted),
                "n_tokens_in_prompt": active.context_size,
                "dataset": names.dataset,
                "vector": _rounded(shown.decoder[j]),
            }
            for j, own in zip(ids, logits, strict=True)
        ]


def write_sae_dashboard(
    folder: Path,
    batches: Iterator[list[Feature]],
    *,
    names: DashboardNames,
    silent: Sequence[int],
) -> None:
    """Write batches, and which latents have none, into a folder."""
    about = {"model_id": names.model_id, "layer": names.layer, "sae_set": names.sae_set}
    for i, features in enumerate(batches):
        batch = {**about, "sae_id_suffix": None, "features": features}
        # On one line: indented, the lists of numbers are five times as long.
        files.write_text(folder / f"batch-{i}.json", json.dumps(batch, allow_nan=False))
    skipped = {**about, "layer": str(names.layer), "skipped_indexes": list(silent)}
    files.write_json(folder / "skipped_indexes.json", skipped)


def _logits(logits: Float[Tensor, " d_vocab"], shown: ShownSite) -> dict[str, list[Any]]:
    """The tokens that a latent promotes and suppresses most, and how the rest lie."""
    n = min(N_LOGITS, len(logits))
    found: dict[str, list[Any]] = {}
    for name, is_largest in (("pos", True), ("neg", False)):
        top = logits.topk(n, largest=is_largest)
        found[f"{name}_str"] = [token_text(shown.tokenizer, i) for i in top.indices.tolist()]
        found[f"{name}_values"] = _rounded(top.values)
    ends = logits.min().item(), logits.max().item()
    return found | _histogram(logits, *ends, name="logits_hist_data")


def _activity(
    active: ActiveTokens, latent: int, examples: Sequence[StoredExample]
) -> dict[str, Any]:
    """How often and how strongly, and the tokens in context."""
    _, values = active.of(latent)
    n_counted, top = int(active.counted.sum()), values.max().item() if len(values) else 0.0
    # Of the largest codes there is one group; the rest is grouped by equal parts of the range.
    edges = torch.linspace(0, top, N_INTERVALS + 1).tolist()
    shares = [n / n_counted for n in values.histc(N_INTERVALS, 0, top).tolist()]
    shares[0] += 1 - len(values) / n_counted  # as in SAEDashboard, where it begins at 0
    groups = [{"bin_min": -1, "bin_max": _round(top), "bin_contains": -1}] + [
        {"bin_min": _round(low), "bin_max": _round(high), "bin_contains": _round(share)}
        for low, high, share in reversed(list(zip(edges, edges[1:], shares, strict=False)))
    ]
    of_group = [0 if e.kind == "top" else N_INTERVALS - _interval(e.value, top) for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (of_group[i], -examples[i].value))
    return {
        "frac_nonzero": len(values) / n_counted,
        **_histogram(values, 0.0, top, name="freq_hist_data"),
        "activations": [{**groups[of_group[i]], **_in_context(examples[i])} for i in order],
    }


def _interval(value: float, top: float) -> int:
    return min(int(value / top * N_INTERVALS), N_INTERVALS - 1)


def _in_context(example: StoredExample) -> dict[str, Any]:
    return {
        "tokens": list(example.tokens),
        "values": [_round(v) for v in example.activations],
        "qualifying_token_index": example.at,
    }


def _histogram(
    values: Float[Tensor, " n"], low: float, high: float, *, name: str
) -> dict[str, list[Any]]:
    """Heights, and the middles of the bars; of no values, none."""
    if not len(values) or high <= low:
        return {f"{name}_bar_heights": [], f"{name}_bar_values": []}
    edges = torch.linspace(low, high, N_BINS + 1)
    return {
        f"{name}_bar_heights": values.histc(N_BINS, low, high).int().tolist(),
        f"{name}_bar_values": _rounded((edges[1:] + edges[:-1]) / 2),
    }


def _rounded(values: Float[Tensor, " n"]) -> list[float]:
    return [_round(v) for v in values.tolist()]


def _round(value: float) -> float:
    """To five digits, whatever the size of codes: they are three quarters of a file."""
    return float(f"{value:.5g}")
