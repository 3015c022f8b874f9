"""`hand_off`: a run in the format of another tool, in a folder of its own.

The models run once over the run's held-out text; the folder is complete or is not there. Names that
a judge has given (`judged.json`) go to Neuronpedia with the dashboards. Limit: of several sites one
is shown; codes are those of the dictionary, which reads all sites together.

delphi's explainers and scorers (Paulo et al. 2024, arXiv 2410.13928) get codes in its own cache:

    latents/HOOK/0_204.safetensors ... config.json        tokenizer/

what `LatentDataset("OUTPUT/latents", sampler_cfg, constructor_cfg)` of eai-delphi 0.1.3 reads
(`delphi/latents/loader.py`, written there by `LatentCache.save_splits` and `save_config`):
`locations [n, 3]` (context, position, latent from the first of the file), `activations [n]`,
`tokens [contexts, pos]`. Codes are float32, where delphi's own are rounded to float16. Limits: the
context size has to be a multiple of its `example_ctx_len` (32); it leaves out latents with fewer
than its `min_examples` contexts (200).
"""

from itertools import pairwise
from pathlib import Path

import torch

from tl_crosscoder import files
from tl_crosscoder.analysis.firing import ActiveTokens, find_active
from tl_crosscoder.crosscoder.site_views import checked_latents
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.integrations.config import HandoffConfig
from tl_crosscoder.integrations.judging import Judged
from tl_crosscoder.integrations.neuronpedia import write_neuronpedia
from tl_crosscoder.integrations.sae_dashboard import (
    ShownSite,
    dashboard_batches,
    write_sae_dashboard,
)
from tl_crosscoder.run.run import Run

N_SPLITS = 5
"""Files with about as many latents each, as delphi's own."""


def hand_off(
    run: Run, output: str | Path, config: HandoffConfig, *, show_progress: bool = False
) -> Path:
    """Write a run for another tool.

    Args:
        run: with examples, for dashboards.
        output: a folder that is new or empty.
        config: which tool, which latents, under which names.
        show_progress: with a progress bar.

    Raises:
        ValueError: the folder holds something, an unknown site or latent, or a hook that the tool
            cannot show.
        FileNotFoundError: the run has no examples or no text.
    """
    output, crosscoder = files.new_folder(output), run.crosscoder
    if config.latents is not None:
        checked_latents(config.latents, crosscoder)
    is_dashboard = config.to != "delphi"
    shown = ShownSite.of(run.models, crosscoder, config.site) if is_dashboard else None
    source, text = run.measured()
    latents = config.latents
    active = find_active(source, crosscoder, text, latents=latents, show_progress=show_progress)
    with files.replacing(output) as temporary:
        temporary.mkdir()
        if shown is not None:
            _write_dashboards(temporary, run, shown, active=active, text=text, config=config)
        else:
            _write_delphi(temporary, run, active, text, model_name=str(output / "tokenizer"))
            source.tokenizer.save_pretrained(temporary / "tokenizer")
    return output


def _write_dashboards(
    folder: Path,
    run: Run,
    shown: ShownSite,
    *,
    active: ActiveTokens,
    text: TokenizedText,
    config: HandoffConfig,
) -> None:
    with run.examples(of=text) as examples:
        known = examples.latents()
        requested = known if config.latents is None else config.latents
        latents = sorted(set(known) & set(requested))
        how = {"latents": latents, "dataset": _dataset(run)}
        batches = dashboard_batches(shown, active, examples, **how)
        if config.to == "sae-dashboard":
            model_id = config.model_id or shown.slug
            about = {"model_id": model_id, "layer": shown.layer, "sae_set": config.set_name}
            silent = sorted(set(range(active.d_sae)) - set(known))
            write_sae_dashboard(folder, batches, about=about, silent=silent)
        else:
            path = run.path / files.JUDGED_NAME
            judged = Judged.load(path) if path.is_file() else None
            write_neuronpedia(folder, batches, shown=shown, config=config, judged=judged)


def _dataset(run: Run) -> str:
    return str(run.record["training"].get("text") or "")


def _write_delphi(
    folder: Path, run: Run, active: ActiveTokens, text: TokenizedText, *, model_name: str
) -> None:
    """Write the codes of a text; `model_name` is what delphi loads where it gets no tokenizer."""
    own = folder / "latents" / run.crosscoder.sites[-1].hook_name
    n_splits = min(N_SPLITS, active.d_sae)
    bounds = torch.linspace(0, active.d_sae, n_splits + 1).long().tolist()
    tokens, size = text.tokens.long(), text.context_size
    contexts, positions = active.positions // size, active.positions % size
    for first, end in pairwise(bounds):
        chosen = (active.latents >= first) & (active.latents < end)
        places = contexts[chosen], positions[chosen], active.latents[chosen] - first
        locations = torch.stack(places, dim=1)
        # Its loader takes both; as in delphi, the smaller where numbers allow.
        is_small = locations.numel() == 0 or int(locations.max()) < 2**16
        tensors = {
            "locations": locations.to(torch.uint16 if is_small else torch.uint32),
            "activations": active.values[chosen],
            "tokens": tokens,
        }
        files.write_tensors(own / f"{first}_{end - 1}.safetensors", tensors)
    # Fields of its `CacheConfig`, and the tokenizer's name.
    config = {
        "dataset_repo": _dataset(run),
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "",
        "batch_size": 1,
        "cache_ctx_len": size,
        "n_tokens": tokens.numel(),
        "n_splits": n_splits,
        "model_name": model_name,
    }
    files.write_json(own / "config.json", config)
