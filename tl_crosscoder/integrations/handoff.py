"""`hand_off`: a run in the format of another tool, in a folder of its own.

Contract: the models run once over the run's held-out text; the folder is complete or is not there.
Names that a judge has given (`judged.json`) travel to Neuronpedia with the dashboards. Limit: of
several sites one is shown; codes are of all of them together, as the dictionary has them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tl_crosscoder import files
from tl_crosscoder.analysis.firing import ActiveTokens, find_active
from tl_crosscoder.analysis.similarity import checked_latents
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.integrations.delphi import write_delphi
from tl_crosscoder.integrations.judge.judged import JUDGED_NAME, Judged
from tl_crosscoder.integrations.neuronpedia import Explained, Release, check_name, write_neuronpedia
from tl_crosscoder.integrations.sae_dashboard import (
    DashboardNames,
    dashboard_batches,
    write_sae_dashboard,
)
from tl_crosscoder.integrations.shown_site import ShownSite
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import examples_of

Tool = Literal["neuronpedia", "sae-dashboard", "delphi"]


@dataclass(frozen=True, kw_only=True)
class HandoffSettings:
    """What is handed off, under which names."""

    latents: tuple[int, ...] | None = None
    """None is all that are active on the held-out text."""
    site: str | None = None
    """Of dashboards: whose directions and logits are shown; None is the fine-tuned model's."""
    model_id: str | None = None
    """Of dashboards: the model's name there; None is the end of its name here."""
    set_name: str = "tl-crosscoder"
    """Of dashboards: the set of dictionaries."""
    release: Release = field(default_factory=Release)
    """Of Neuronpedia."""


def hand_off(
    run: Run,
    output: str | Path,
    *,
    to: Tool,
    settings: HandoffSettings | None = None,
    show_progress: bool = False,
) -> Path:
    """Write a run for another tool.

    Args:
        run: with examples, for dashboards.
        output: a folder that is new or empty.
        to: see `sae_dashboard`, `neuronpedia` and `delphi` for what each gets.
        settings: which latents, under which names.
        show_progress: with a progress bar.

    Raises:
        ValueError: the folder holds something, an unknown site or latent, or a hook that the tool
            cannot show.
        FileNotFoundError: the run has no examples or no text.
    """
    output, settings = files.new_folder(output), settings or HandoffSettings()
    chosen = settings.latents
    if chosen is not None:
        checked_latents(chosen, run.crosscoder)
    shown = None if to == "delphi" else ShownSite.of(run.models, run.crosscoder, settings.site)
    if shown is not None and to == "neuronpedia":
        for name in (settings.model_id or shown.slug, settings.set_name):
            check_name(name)
    source, text = run.measured()
    active = find_active(source, run.crosscoder, text, latents=chosen, show_progress=show_progress)
    with files.replacing(output) as temporary:
        temporary.mkdir()
        if shown is None:
            write_delphi(
                temporary,
                active,
                text,
                hookpoint=run.crosscoder.sites[-1].hook_name,
                tokenizer=source.tokenizer,
                tokenizer_name=str(output / "tokenizer"),
                dataset=_dataset(run),
            )
        else:
            _write_dashboards(temporary, run, shown, active, text, to=to, settings=settings)
    return output


def _write_dashboards(
    folder: Path,
    run: Run,
    shown: ShownSite,
    active: ActiveTokens,
    text: TokenizedText,
    *,
    to: Tool,
    settings: HandoffSettings,
) -> None:
    names = DashboardNames(
        model_id=settings.model_id or shown.slug,
        layer=shown.layer,
        sae_set=settings.set_name,
        dataset=_dataset(run),
    )
    with examples_of(run, text) as examples:
        known = examples.latents()
        asked = known if settings.latents is None else settings.latents
        latents = sorted(set(known) & set(asked))
        pages = dashboard_batches(shown, active, examples, names=names, latents=latents)
        if to == "sae-dashboard":
            silent = sorted(set(range(active.d_sae)) - set(known))
            write_sae_dashboard(folder, pages, names=names, silent=silent)
        else:
            write_neuronpedia(
                folder,
                pages,
                shown=shown,
                names=names,
                release=settings.release,
                explained=_explained(run),
            )


def _explained(run: Run) -> Sequence[Explained]:
    """What a judge has said of the run's latents, if one has been asked."""
    path = run.path / JUDGED_NAME
    if not path.is_file():
        return []
    judged = Judged.load(path)
    return [
        Explained(
            latent=row.latent,
            text=f"{row.name}: {row.explanation}",
            notes=f"By {judged.model}. Balanced accuracy of detection {row.detection:.2f} "
            f"[{row.low:.2f}, {row.high:.2f}] on {row.n_read} windows.",
        )
        for row in judged.rows
        if row.explanation
    ]


def _dataset(run: Run) -> str:
    return str(run.record["training"].get("text") or "")
