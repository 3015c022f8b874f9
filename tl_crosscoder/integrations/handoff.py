"""`hand_off`: a run in the format of another tool, in a folder of its own.

The models run once over the run's held-out text; the folder is complete or is not there. Names that
a judge has given (`judged.json`) go to Neuronpedia with the dashboards. Limit: of several sites one
is shown; codes are those of the dictionary, which reads all sites together.
"""

from pathlib import Path

from tl_crosscoder import files
from tl_crosscoder.analysis.firing import ActiveTokens, find_active
from tl_crosscoder.crosscoder.site_views import checked_latents
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.integrations.config import HandoffConfig
from tl_crosscoder.integrations.delphi import write_delphi
from tl_crosscoder.integrations.judge.judging import Judged
from tl_crosscoder.integrations.neuronpedia import write_neuronpedia
from tl_crosscoder.integrations.sae_dashboard import (
    ShownSite,
    dashboard_batches,
    write_sae_dashboard,
)
from tl_crosscoder.run.run import Run


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
            write_delphi(
                temporary,
                active,
                text,
                hookpoint=crosscoder.sites[-1].hook_name,
                tokenizer=source.tokenizer,
                tokenizer_name=str(output / "tokenizer"),
                dataset=_dataset(run),
            )
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
