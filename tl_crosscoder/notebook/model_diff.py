"""`diff`: what fine-tuning changed, live in a notebook.

    diff = tl_crosscoder.diff("org/base", "org/tuned", hook_name="blocks.9.hook_resid_post",
                              text="text.jsonl")
    diff.top(10)                                    diff.try_prompt("Who are you?")
    diff.latent(123)                                diff.ablate([123]).generate("Who are you?")

Contract: a `ModelDiff` is a run's folder with its models, so the command line opens what a notebook
made, and `load_diff` what the command line made; no model keeps a hook between two calls. Limit:
one dictionary; what compares several is in `analysis`.
"""

import difflib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from shutil import copytree
from typing import TYPE_CHECKING, Any

from jaxtyping import Int
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.analysis.measurement import Measurement
from tl_crosscoder.config.causal import (
    AttributionQuestion,
    CausalQuestion,
    ChangesQuestion,
    CurvesQuestion,
    LatentsQuestion,
)
from tl_crosscoder.config.null import NullConfig, NullKind
from tl_crosscoder.config.presets import Preset, preset_from, preset_name
from tl_crosscoder.config.presets import preset as make_preset
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.data.text import Text, checked_text
from tl_crosscoder.interventions.attribution_result import Attribution
from tl_crosscoder.interventions.causal_rows import CausalTest
from tl_crosscoder.interventions.changes_result import Changes
from tl_crosscoder.interventions.context import InterventionContext
from tl_crosscoder.interventions.edits import AddLatents
from tl_crosscoder.interventions.latent_edits import (
    Direction,
    Mode,
    ablation,
    activation_norms,
    steering,
)
from tl_crosscoder.interventions.patching import PatchingResult
from tl_crosscoder.interventions.several_hooks import ablation_at_every_hook
from tl_crosscoder.interventions.waterfall import Waterfall
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import ANY_HOOK, site_columns
from tl_crosscoder.notebook.latent import Hits, LatentView, TopLatents, search
from tl_crosscoder.notebook.prompts import EditedDiff, PromptDiff, prompt_diff
from tl_crosscoder.report.answer import answer_sections, with_answer
from tl_crosscoder.report.figures import run_figures
from tl_crosscoder.report.html import ReportSettings, report
from tl_crosscoder.report.sections import render
from tl_crosscoder.results.measures import spoken
from tl_crosscoder.results.render import Section, as_html
from tl_crosscoder.run.attribution import attribute_run, ranking_of, waterfall_run
from tl_crosscoder.run.causal import (
    N_NEUTRAL_TOKENS,
    N_NEW_TOKENS,
    Prompt,
    ablate_run,
    patch_run,
    steer_run,
)
from tl_crosscoder.run.changes import answer_run, changes_run
from tl_crosscoder.run.curves import curves_run
from tl_crosscoder.run.floor import Floor
from tl_crosscoder.run.null import null_run
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train
from tl_crosscoder.train.checkpoint import check_output

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from tl_crosscoder.notebook.serve import Served

Model = str | Path | HookedModel
"""A name, a folder, or a model of either TransformerLens kind."""
Latents = Sequence[int] | Int[Tensor, " n"]
_OF_NAMES = ("adapter", "device", "dtype", "merge_adapter", "revision", "finetuned_revision")
"""Settings of models that are loaded by name."""


def diff(
    base: Model,
    finetuned: Model | None = None,
    *,
    hook_name: str | None = None,
    text: Text,
    adapter: str | Path | None = None,
    preset: str | Preset = "batchtopk",
    d_sae: int | None = None,
    k: float | None = None,
    n_tokens: int | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    device: str | None = None,
    seed: int = 0,
    model_names: tuple[str, str] | None = None,
    changes: bool = True,
    **settings: Any,
) -> "ModelDiff":
    """Train a dictionary over both models, measure it, and give all there is to look at.

    Args:
        base: the base model: a hub name, a folder, an embedded name, or a loaded TransformerLens
            model of either kind.
        finetuned: the fine-tuned model, likewise.
        hook_name: hook point that is read in both; None takes the one that a layer scan recommends,
            and prints why (see `scan`).
        text: a file, a folder or a `datasets` name; a list of strings or of documents; or a
            `TokenizedText`, of whose contexts a share is held out.
        adapter: a LoRA adapter on the base, in place of `finetuned`.
        preset: which dictionary: a name, or `preset(name, ...)` with options.
        d_sae: number of latents; None is by width and length, see `TrainConfig.plan`.
        k: mean number of active latents a token; None is 16.
        n_tokens: activation pairs to train on; None is ten passes over the text, at most 2 million.
        output: new or empty folder for the run; None is a temporary one, whose path is printed and
            which `ModelDiff.save` copies to where it stays.
        resume: continue the run in `output`, whatever stopped it; a finished one is just opened.
        device: of models that are loaded here; None is the CPU.
        seed: of weights, data and split.
        model_names: what is recorded of loaded models, to find them again; None is their own names.
        changes: look for what changed when the dictionary is measured, about a minute of small
            models; without it `ModelDiff.changes` does.
        settings: any other field of `RunConfig`, such as `lr`, `context_size` or `dtype`, and any
            option of the preset, such as `shared_share`.

    Raises:
        ValueError, FileNotFoundError: bad input, before any long work; nothing is overwritten.
        FloatingPointError, TrainingInterruptedError: see `Trainer.fit`; `resume` goes on.
    """
    if output is not None:
        check_output(files.user_path(output), resume=resume)
    elif resume:
        raise ValueError("resume continues the run of a folder: name it with output.")
    settings |= {"hook_name": hook_name, "preset": preset, "d_sae": d_sae, "k": k, "seed": seed}
    settings |= {"n_tokens": n_tokens, "device": device}
    settings |= {"adapter": None if adapter is None else str(adapter)}
    given = _with_preset({name: value for name, value in settings.items() if value is not None})
    given |= names_of(base, finetuned, given, model_names)
    content = checked_text(text, on_bad_document=given.get("on_bad_document", "error"))
    if isinstance(content, str | Path):
        given["text"], content = str(content), None
    given["output"] = str(output or tempfile.mkdtemp(prefix="tl_crosscoder-"))
    config = RunConfig.from_mapping(given, name="diff")
    models = None
    if config.base is None:
        models = _pair(base, finetuned, config, model_names)
    how = {"resume": resume, "choose_hook": hook_name is None}
    run = train(config, models=models, text=content, **how)
    if changes:
        answer_run(run)
    return ModelDiff(run=run)


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    """Settings, checked by name, with options such as `k` moved into the preset that has them."""
    chosen = preset_from(given.get("preset", "batchtopk"))
    options = {f.name for f in fields(chosen)} & given.keys()
    own = {name: given.pop(name) for name in options}
    known = {f.name for f in fields(RunConfig)} - {"cache", "mixture"}
    for name in given.keys() - known:
        near = difflib.get_close_matches(name, known, n=3)
        raise ValueError(
            f"diff has no setting {name!r}"
            + (f"; nearest: {', '.join(map(repr, near))}" if near else "")
            + ". Settings are the fields of tl_crosscoder.RunConfig and the options of preset "
            f"{preset_name(chosen)!r}; a cache or a mixture of texts is trained on with train, and "
            "opened with load_diff."
        )
    return given | {"preset": make_preset(preset_name(chosen), **(asdict(chosen) | own))}


def names_of(
    base: Model,
    finetuned: Model | None,
    given: Mapping[str, Any],
    model_names: tuple[str, str] | None,
) -> dict[str, str | None]:
    """Fields of a config that name the models; empty where they are loaded."""
    each = [base, *([] if finetuned is None else [finetuned])]
    are_names = [isinstance(m, str | Path) for m in each]
    if all(are_names) and model_names is None:
        return {"base": str(base), "finetuned": None if finetuned is None else str(finetuned)}
    if any(are_names) or len(each) < 2:
        raise ValueError(
            f"base is {_kind(base)} and finetuned {_kind(finetuned)}: give names of both (or an "
            "adapter), or both loaded, with model_names or without."
        )
    refused = sorted({*_OF_NAMES} & given.keys())
    if refused:
        raise ValueError(
            f"the models are loaded already, so {', '.join(refused)} cannot be chosen: leave it "
            "out, or give the names of the models."
        )
    return {}


def _kind(model: Any) -> str:
    return repr(model) if isinstance(model, str | Path | None) else f"a {type(model).__name__}"


def _pair(
    base: Any, finetuned: Any, config: RunConfig, model_names: tuple[str, str] | None
) -> ModelPair:
    """Loaded models. Raises ValueError where a dictionary could not tell them apart by name."""
    hook_name = config.hook_name or ANY_HOOK
    if "," in hook_name:
        raise ValueError(
            f"hook_name is {hook_name!r}: loaded models are read at one hook point. Several are "
            "read in models that are given by name."
        )
    pair = ModelPair(base, finetuned, hook_name=hook_name, model_names=model_names)
    names = [site.model_name for site in pair.model_sites]
    if names[0] == names[1] and model_names is None:
        raise ValueError(
            f"both models call themselves {names[0]!r}, and a dictionary records its models by "
            "name. Say what they are with model_names=(base, finetuned): hub names or folders."
        )
    return pair.difference() if config.difference else pair


def load_diff(
    folder: str | Path, *, models: ModelPair | None = None, device: str = "cpu"
) -> "ModelDiff":
    """Open a finished run: one of `diff`, of `train` or of `tl-crosscoder train`.

    Args:
        folder: where it is, or the name of an embedded dictionary, such as
            `tl_crosscoder/taboo-batchtopk`.
        models: those it was made of, where they are loaded; None loads them, by the names that the
            dictionary records, when they are first needed.
        device: for models that are loaded here, and the dictionary.

    Raises:
        FileNotFoundError, ValueError: no finished run there, or models of another.
    """
    if models is not None:
        device = str(models.device)
    run = Run(path=files.user_path(folder), device=device, loaded=models)
    return ModelDiff(run=run)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelDiff:
    """What was found, and what can be tried, of one dictionary over two models."""

    run: Run

    @property
    def path(self) -> Path:
        """Folder of the run."""
        return self.run.path

    @property
    def crosscoder(self) -> Crosscoder:
        """The dictionary."""
        return self.run.crosscoder

    @property
    def models(self) -> ModelPair:
        """The models at their sites, loaded now if they are not yet."""
        return self.run.models

    @property
    def measurement(self) -> Measurement:
        """Everything measured on held-out text."""
        return self.run.measurement()

    @cached_property
    def ctx(self) -> InterventionContext:
        """Models and dictionary, checked: what interventions take."""
        return InterventionContext.of(self.run.models, self.run.crosscoder)

    # --- what was found --------------------------------------------------------------------------

    def top(
        self,
        n: int = 10,
        *,
        order: str | None = None,
        toward: str = "finetuned",
    ) -> TopLatents:
        """The latents that carry most of the change, or the first of another order.

        Shown, each has the token on which it is most active.

        Args:
            n: how many.
            order: see `ranking_of`: `attribution` where the folder has one, or models are loaded.
            toward: which model's latents.

        Raises: as `ranking_of` does.
        """
        ranking = ranking_of(self.run, n=n, order=order, toward=toward)
        return TopLatents(run=self.run, ranking=ranking)

    def latent(self, latent: int) -> LatentView:
        """All that is known of one latent. Raises ValueError for one that does not exist."""
        return LatentView.of(self.run, latent)

    def search(self, text: str, *, n: int = 20) -> Hits:
        """Latents with a text among their examples, those active on it first."""
        return search(self.run, text, n=n)

    @property
    def figures(self) -> dict[str, "go.Figure"]:
        """Figures of everything in the run's folder, by name."""
        return run_figures(self.run)

    # --- what can be tried -----------------------------------------------------------------------

    def try_prompt(
        self,
        prompt: Prompt,
        *,
        latents: Latents | None = None,
        n: int = 8,
        max_new_tokens: int = N_NEW_TOKENS,
    ) -> PromptDiff:
        """What both models write, and which latents explain the difference; see `prompt_diff`."""
        options = {"latents": latents, "n": n, "max_new_tokens": max_new_tokens}
        return prompt_diff(self.run, self.ctx, prompt, **options)

    def ablate(
        self, latents: Latents, *, mode: Mode = "delta", every_hook: bool = False
    ) -> EditedDiff:
        """The fine-tuned model without latents; `mode` as in `ablated`.

        With `every_hook`, of a dictionary over several, at all of them in turn: see
        `interventions.several_hooks`.
        """
        edit = (ablation_at_every_hook if every_hook else ablation)(self.ctx, latents, mode)
        where = ", every hook" if every_hook else ""
        return self._edited(
            edit, f"{self._model(edit.site)} without {_listed(latents)} ({mode}{where})"
        )

    def insert(self, latents: Latents) -> EditedDiff:
        """The base model's stream plus what latents add to it: x^0 + sum f_j (d_j^1 - d_j^0).

        The patch of Minder et al. 2025 (arXiv 2504.02922). Raises ValueError for latents out of
        range.
        """
        ids, site = self.ctx.latents(latents), self.ctx.base
        directions = self.ctx.difference[ids]
        edit = AddLatents(site=site, stream=site, latents=ids, directions=directions)
        return self._edited(edit, f"{self._model(site)} with what {_listed(latents)} add")

    def steer(
        self,
        direction: Direction,
        *,
        strength: float = 1.0,
        site: str | None = None,
        norm: float | None = None,
    ) -> EditedDiff:
        """A model steered along a latent's fine-tuned decoder row, or a vector.

        Args:
            direction: a latent, or a vector.
            strength: in units of `norm`; below 0 steers away.
            site: name of the steered site; None is the base.
            norm: mean norm of the stream there; None is that of the held-out text.

        Raises: as `steering` does.
        """
        site = site or self.ctx.site_name(self.ctx.base)
        norm = self.norms[site] if norm is None else norm
        edit = steering(self.ctx, direction, strength=strength, norm=norm, site=site)
        what = "a vector" if isinstance(direction, Tensor) else f"latent {direction}"
        return self._edited(edit, f"{self._model(edit.site)} steered by {strength:g} x {what}")

    @cached_property
    def norms(self) -> dict[str, float]:
        """Mean norm of each site's stream on held-out text: the unit of steering."""
        _, contexts = self.run.measured()
        return activation_norms(self.ctx.models, self.run.some(contexts, N_NEUTRAL_TOKENS))

    # --- with controls ---------------------------------------------------------------------------

    def changes(self, **question: Any) -> Changes:
        """What changed; fields of `config.causal.ChangesQuestion`. It is kept in the folder."""
        return changes_run(self.run, ChangesQuestion(**question))

    def attribution(self, **question: Any) -> Attribution:
        """What each latent carries of the change; fields of `config.causal.AttributionQuestion`.

        Kept in the folder, where `top` and the tests below find their order.
        """
        return attribute_run(self.run, AttributionQuestion(**question))

    def waterfall(self, **question: Any) -> Waterfall:
        """How much of the change passes the hook, and what the latents hold; kept in the folder."""
        return waterfall_run(self.run, AttributionQuestion(**question))

    def floor(
        self,
        kind: NullKind = "self",
        *,
        text: Text | None = None,
        resume: bool = False,
        **config: Any,
    ) -> Floor:
        """The same numbers for a pair that should show nothing; kept in the folder.

        Args:
            kind: `self`, the base against a fine-tune of it on its own samples, or `identical`.
            text: the text of `diff`, where it was no name.
            resume: continue what is there, or measure it again.
            config: other fields of `NullConfig`, such as `n_steps` and `lr`.

        Raises: as `null_run` does.
        """
        how = NullConfig(kind=kind, **config)
        return null_run(self.run, how, text=text, resume=resume)

    def patching(self, **question: Any) -> PatchingResult:
        """KL recovery; fields of `config.causal.LatentsQuestion`. It is kept in the folder."""
        return patch_run(self.run, LatentsQuestion(**question))

    def necessity(
        self, *, mode: Mode = "delta", every_hook: bool = False, **question: Any
    ) -> list[CausalTest]:
        """What ablating removes, with controls; fields of `config.causal.CausalQuestion`.

        With `every_hook`, of a dictionary over several: at the highest alone, and at all in turn.
        """
        how = {"mode": mode, "every_hook": every_hook}
        return ablate_run(self.run, CausalQuestion(**question), **how)

    def sufficiency(
        self, *, strengths: Sequence[float] = (0.5, 1.0, 2.0), **question: Any
    ) -> list[CausalTest]:
        """What inserting latents into the base induces, and steering it; fields as `necessity`."""
        return steer_run(self.run, CausalQuestion(**question), strengths=strengths)

    def curves(self, **question: Any) -> list[CausalTest]:
        """Both by number of latents; fields of `config.causal.CurvesQuestion`."""
        return curves_run(self.run, CurvesQuestion(**question))

    # --- to keep ---------------------------------------------------------------------------------

    def report(self, path: str | Path | None = None, **settings: Any) -> Path:
        """One HTML file of everything, to open without a network.

        Args:
            path: of the file, `.html`; None is `report.html` in the folder.
            settings: fields of `ReportSettings`, such as `n_latents`.

        Raises: as `report.html.report` does.
        """
        how = {"settings": ReportSettings(**settings), "output": path, "show_progress": True}
        return report(self.run, **how)

    def serve(self, *, port: int = 0, **settings: Any) -> "Served":
        """The report with the models behind it, at an address of this machine; returns at once.

        Args:
            port: 0 takes a free one.
            settings: fields of `ReportSettings`, such as `n_latents`.

        Raises: as `notebook.serve.serve` does.
        """
        from tl_crosscoder.notebook.serve import serve

        own: dict[str, Any] = {"samples": None} | settings
        return serve(self, port=port, settings=ReportSettings(**own), show_progress=True)

    def save(self, folder: str | Path) -> Path:
        """Copy the run, with all results so far, to a new or empty folder.

        Raises ValueError for a folder that holds something.
        """
        folder = files.new_folder(folder)
        with files.replacing(folder) as temporary:
            copytree(self.path, temporary)
        return folder

    def __repr__(self) -> str:
        sites = ", ".join(f"{s.name}={s.label!r}" for s in self.crosscoder.sites)
        return f"ModelDiff({sites}, d_sae={self.crosscoder.cfg.d_sae:,}, path={str(self.path)!r})"

    def __str__(self) -> str:
        return with_answer(self.path, render(self.measurement, self.crosscoder.sites))

    def _repr_html_(self) -> str:
        sites = Section(columns=site_columns(self.crosscoder.sites))
        return as_html([*answer_sections(self.path), sites, *self.measurement.sections()])

    def _model(self, site: int) -> str:
        return f"the {spoken(self.ctx.site_name(site))} model"

    def _edited(self, edit: Any, name: str) -> EditedDiff:
        return EditedDiff(run=self.run, ctx=self.ctx, edit=edit, name=name)


def _listed(latents: Latents) -> str:
    ids = [int(j) for j in latents]
    names = ", ".join(map(str, ids[:8])) + (", …" if len(ids) > 8 else "")
    return f"latent{'s' * (len(ids) != 1)} {names}" if ids else "no latents"
