"""Dashboards of latents as SAEDashboard writes them: `batch-0.json`, `batch-1.json`, ...

Fields are those of `NeuronpediaDashboardBatch`, `NeuronpediaDashboardFeature` and
`NeuronpediaDashboardActivation` of sae-dashboard 0.8.0 (`neuronpedia/neuronpedia_dashboard.py`),
which its loaders and Neuronpedia's converter read; `skipped_indexes.json` lists silent latents.
Histograms and intervals are over the whole text; examples are those of the run's database.
Limits: logits are centred over the vocabulary, with the final norm's scale (see `analysis.lens`),
where SAEDashboard takes the bare product; tables of correlated neurons and features stay empty, as
its converter leaves them where there are none.
"""

import json
import re
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
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.site_views import check_source
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import Site, site_index
from tl_crosscoder.models.tokenizer import token_text

N_BINS = 50
"""Bars of a histogram, as in SAEDashboard."""
N_INTERVALS = 5
"""Equal parts of the range of codes by which examples are grouped, as in its runner."""
N_LOGITS = 10
N_PER_BATCH = 128
"""Latents a batch."""
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


@dataclass(frozen=True, kw_only=True, eq=False)
class ShownSite:
    """The one site that a dashboard shows: its model, with the latents' directions in it."""

    site: Site
    model: HookedModel
    tokenizer: Any
    decoder: Float[Tensor, "d_sae d_model"]
    """What each latent writes there, per unit of code."""
    n_vocab: int
    """Ids that are tokens: a model may have more logits."""
    layer: int
    hook_point: str
    """The hook's name in its block, such as `hook_resid_post`."""

    @classmethod
    def of(
        cls,
        models: ModelPair,
        crosscoder: Crosscoder,
        site: str | None = None,
    ) -> "ShownSite":
        """Choose a site by name; None is the one that stands for the fine-tuned model.

        A diff-SAE shows the fine-tuned model, with the directions of the difference.

        Raises:
            ValueError: an unknown site, models of another dictionary, or a hook outside the blocks
                or off the residual stream.
        """
        check_source(models, crosscoder)
        position = 0 if models.compared is None else models.compared[1]
        if models.is_difference:
            at = 0 if site is None else site_index(models.sites, site)
        else:
            at = position = position if site is None else site_index(models.sites, site)
        own = models.sites[at]
        found = re.fullmatch(r"blocks\.(\d+)\.(.+)", own.hook_name)
        if found is None:
            raise ValueError(
                f"the hook {own.hook_name!r} is outside the blocks, and dashboards are numbered by "
                "layer: hand off a dictionary of a hook such as 'blocks.0.hook_resid_post'."
            )
        model = models.models[position]
        if own.d_model != model.cfg.d_model:
            raise ValueError(
                f"site {own.name!r} is {own.d_model} wide and not on the residual stream of "
                f"{model.cfg.d_model}, so that its latents have no logits to show. Name another "
                f"site (--site) of {[(s.name, s.d_model) for s in models.sites]}, or hand off a "
                "dictionary of a hook such as 'blocks.0.hook_resid_post'."
            )
        return cls(
            site=own,
            model=model,
            tokenizer=models.tokenizer,
            decoder=crosscoder.decoder(at).detach(),
            n_vocab=min(models.d_vocab, len(models.tokenizer)),
            layer=int(found.group(1)),
            hook_point=found.group(2),
        )

    @property
    def slug(self) -> str:
        """The model's name in letters, digits, `-` and `_`, which is what Neuronpedia takes."""
        return re.sub(r"[^a-z0-9_-]+", "-", self.site.label.rstrip("/").split("/")[-1].lower())


@torch.no_grad()
def dashboard_batches(
    shown: ShownSite,
    active: ActiveTokens,
    examples: ExampleDatabase,
    *,
    latents: Sequence[int],
    dataset: str = "",
) -> Iterator[list[Feature]]:
    """Dashboards of latents, a batch at a time.

    Args:
        shown: the model whose logits and directions are shown.
        active: of the text that the examples are from.
        examples: of the run.
        latents: which.
        dataset: name of the text.

    Raises:
        ValueError: the hook is not on the residual stream, or the model has no unembedding.
    """
    readout = Readout.of(shown.model, d_vocab=shown.n_vocab)
    for start in range(0, len(latents), N_PER_BATCH):
        ids = list(latents[start : start + N_PER_BATCH])
        logits = readout.logits(shown.decoder[ids]).float().cpu()
        yield [
            {
                **_EMPTY,
                "feature_index": j,
                **_logits(own, shown),
                **_activity(active, j, examples.latent(j)),
                "n_prompts_total": len(active.mask),
                "n_tokens_in_prompt": active.context_size,
                "dataset": dataset,
                "vector": _rounded(shown.decoder[j]),
            }
            for j, own in zip(ids, logits, strict=True)
        ]


def write_sae_dashboard(
    folder: Path, batches: Iterator[list[Feature]], *, about: dict[str, Any], silent: Sequence[int]
) -> None:
    """Write batches, and which latents have none, into a folder.

    Args:
        folder: to write into.
        batches: from `dashboard_batches`.
        about: `model_id`, `layer` and `sae_set`, under which they are filed.
        silent: latents that are never active on the text.
    """
    for i, features in enumerate(batches):
        batch = {**about, "sae_id_suffix": None, "features": features}
        # On one line: indented, the lists of numbers are five times as long.
        files.write_text(folder / f"batch-{i}.json", json.dumps(batch, allow_nan=False))
    skipped = {**about, "layer": str(about["layer"]), "skipped_indexes": list(silent)}
    files.write_json(folder / "skipped_indexes.json", skipped)


def _logits(logits: Float[Tensor, " d_vocab"], shown: ShownSite) -> Feature:
    """The tokens that a latent promotes and suppresses most, and how the rest lie."""
    n, found = min(N_LOGITS, len(logits)), {}
    for name, is_largest in (("pos", True), ("neg", False)):
        top = logits.topk(n, largest=is_largest)
        found[f"{name}_str"] = [token_text(shown.tokenizer, i) for i in top.indices.tolist()]
        found[f"{name}_values"] = _rounded(top.values)
    ends = logits.min().item(), logits.max().item()
    return found | _histogram(logits, *ends, name="logits_hist_data")


def _activity(active: ActiveTokens, latent: int, examples: Sequence[StoredExample]) -> Feature:
    """How often and how strongly a latent is active, and the tokens in context."""
    _, values = active.of(latent)
    n_counted, top = int(active.mask.sum()), values.max().item() if len(values) else 0.0
    # The largest codes are one group; the rest is grouped by equal parts of the range.
    edges = torch.linspace(0, top, N_INTERVALS + 1).tolist()
    shares = [n / n_counted for n in values.histc(N_INTERVALS, 0, top).tolist()]
    shares[0] += 1 - len(values) / n_counted  # as in SAEDashboard, where it begins at 0
    groups = [{"bin_min": -1, "bin_max": _round(top), "bin_contains": -1}] + [
        {"bin_min": _round(low), "bin_max": _round(high), "bin_contains": _round(share)}
        for low, high, share in reversed(list(zip(edges, edges[1:], shares, strict=False)))
    ]
    found = []
    for e in examples:
        interval = min(int(e.value / top * N_INTERVALS), N_INTERVALS - 1)
        found.append((0 if e.kind == "top" else N_INTERVALS - interval, e))
    found.sort(key=lambda pair: (pair[0], -pair[1].value))
    return {
        "frac_nonzero": len(values) / n_counted,
        **_histogram(values, 0.0, top, name="freq_hist_data"),
        "activations": [
            {
                **groups[i],
                "tokens": list(e.tokens),
                "values": [_round(v) for v in e.activations],
                "qualifying_token_index": e.at,
            }
            for i, e in found
        ],
    }


def _histogram(values: Float[Tensor, " n"], low: float, high: float, *, name: str) -> Feature:
    """Heights, and the middles of the bars; both empty where there are no values."""
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
    """Five digits, whatever the size of codes: they are three quarters of a file."""
    return float(f"{value:.5g}")
