"""A run started from Python with whatever is at hand: names or loaded models, any kind of text.

Contract: what it leaves in its folder is what `run_diff` leaves, so the command line opens it; text
that is no file is kept there as far as it is held out. Sizes that are not given follow from the
text and the models, see `sized`. Limit: two loaded models and one hook point; names take as many as
`RunConfig` does.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from tl_crosscoder.activations.text import TokenizedText
from tl_crosscoder.compared_models import ComparedModels
from tl_crosscoder.diffing import check_models, train_and_measure
from tl_crosscoder.estimate import estimate
from tl_crosscoder.hooked_model import HookedModel
from tl_crosscoder.live.live_text import Text, checked_text, read_text
from tl_crosscoder.pair import ModelPair
from tl_crosscoder.presets import recipe_of
from tl_crosscoder.run_text import RunText, check_text
from tl_crosscoder.site_difference import SiteDifference
from tl_crosscoder.sources import load_source
from tl_crosscoder.train.config import RunConfig
from tl_crosscoder.train.trainer import crosscoder_config

Model = str | Path | HookedModel
"""A name, a folder, or a model of either TransformerLens kind."""
Models = ComparedModels | SiteDifference

MOST_TOKENS, MOST_PASSES = 2_000_000, 10
TOKENS_PER_LATENT = 100
LEAST_STEPS, LEAST_BATCH = 500, 64
_OF_NAMES = ("adapter", "device", "dtype", "merge_adapter", "revision", "finetuned_revision")
_SCALARS = {bool, int, float, str, NoneType}
_NOT_HERE = ("cache", "mixture", "text", "output", "base", "finetuned")


@dataclass(frozen=True, kw_only=True)
class LiveRun:
    """A run that is about to begin: everything loaded, read and checked."""

    config: RunConfig
    models: Models
    text: RunText

    @classmethod
    def of(
        cls,
        base: Model,
        finetuned: Model | None,
        *,
        text: Text,
        settings: Mapping[str, Any],
        model_names: tuple[str, str] | None = None,
    ) -> "LiveRun":
        """Load and read; what can be refused is refused before that.

        Args:
            base: the base model.
            finetuned: the fine-tuned one; None with an adapter, or with several hook points.
            text: what to train and measure on.
            settings: fields of `RunConfig` that are given, by name; None is its default.
            model_names: what a dictionary records of loaded models.

        Raises:
            ValueError, FileNotFoundError: bad settings, models or text.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        _check_settings(given)
        named = _named(base, finetuned, given, model_names)
        content = checked_text(text)
        path = str(content) if isinstance(content, str | Path) else None
        if "n_tokens" in given:
            given.setdefault("batch_size", _batch_size(given["n_tokens"]))
        config = RunConfig(**{"output": "", **given, **named, "text": path})
        if path is not None:
            check_text(config)
        if named:
            check_models(config)
        recipe_of(config)
        models = load_source(config) if named else _pair(base, finetuned, config, model_names)
        changes: dict[str, Any] = {} if named else {"dtype": _dtype(models)}
        if "context_size" not in given:
            changes["context_size"] = min(config.context_size, models.n_ctx)
        config = replace(config, **changes)
        crosscoder_config(models, config, recipe_of(config))  # refuses what cannot be
        if isinstance(content, TokenizedText):
            config = replace(config, context_size=content.context_size, pack=False)
        read = read_text(config, models, content)
        config = sized(config, read.training.n_tokens, models.d_model, given)
        return cls(config=config, models=models, text=read)

    def describe(self) -> str:
        """One line: what is going to be done, and of named models for how long, about."""
        config, recipe, sites = self.config, recipe_of(self.config), self.models.sites
        named = [*(s.minus for s in sites if s.minus), *sites]
        models = " and ".join(dict.fromkeys(s.label for s in named))
        hooks = ", ".join(dict.fromkeys(s.hook_name for s in named))
        k = getattr(recipe.sparsity, "k", None)
        d_sae = crosscoder_config(self.models, config, recipe).d_sae
        seconds = estimate(config).seconds if config.base is not None else None
        return (
            f"{models} at {hooks}: {config.preset}, {d_sae:,} latents"
            f"{'' if k is None else f', k {k:g}'}, {config.n_tokens:,} activation pairs of "
            f"{self.text.training.n_tokens:,} tokens of text"
            f"{'' if seconds is None else f', about {_duration(sum(seconds.values()))}'}."
        )

    def train(self, output: Path, *, resume: bool = False) -> None:
        """Train, measure, and leave it all in `output`; a run that is whole there stays as it is.

        Raises: as `train_and_measure` does.
        """
        config = replace(self.config, output=str(output))
        train_and_measure([config], self.models, self.text, resume=resume)


def sized(config: RunConfig, n_text_tokens: int, d_model: int, given: Collection[str]) -> RunConfig:
    """What was not given, by the size of the text and of the models.

    Ten passes over the text, at most two million activation pairs; one latent for every 100 of
    them, at most `expansion` times the width; 500 steps or more, by smaller batches; and a warm-up
    of a tenth of the steps at most. The factors are rules of thumb.
    """
    n_tokens = config.n_tokens
    if "n_tokens" not in given:
        n_tokens = max(LEAST_BATCH, min(MOST_TOKENS, MOST_PASSES * n_text_tokens))
    batch_size = config.batch_size
    if "batch_size" not in given:
        n = config.n_accumulated
        batch_size = max(n, _batch_size(n_tokens) // n * n)
    n_latents = max(round(4 * (config.k or 16)), n_tokens // TOKENS_PER_LATENT)
    new = {
        "n_tokens": max(n_tokens, batch_size),
        "batch_size": batch_size,
        "lr_warmup_steps": min(config.lr_warmup_steps, n_tokens // batch_size // 10),
    }
    if "expansion" not in given:
        new["d_sae"] = min(config.expansion * d_model, n_latents)
    return replace(config, **{name: v for name, v in new.items() if name not in given})


def _batch_size(n_tokens: int) -> int:
    most = RunConfig(output="").batch_size
    return min(most, n_tokens, max(LEAST_BATCH, n_tokens // LEAST_STEPS))


def _check_settings(given: Mapping[str, Any]) -> None:
    known = {f.name for f in fields(RunConfig)} - {*_NOT_HERE}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(
                f"diff has no setting {name!r}"
                + (f"; nearest: {', '.join(map(repr, near))}" if near else "")
                + ". Settings are the fields of tl_crosscoder.RunConfig; a cache or a mixture of "
                "texts is trained on with run_diff, and opened with load_diff."
            )
    hints = get_type_hints(RunConfig)
    for name, value in given.items():
        kinds = get_args(hints[name]) or (hints[name],)
        kinds = (*kinds, int) if float in kinds else kinds
        if set(kinds) <= _SCALARS and type(value) not in kinds:
            names = " or ".join(k.__name__ for k in kinds if k is not NoneType)
            raise ValueError(f"{name} is {value!r}, a {type(value).__name__}; it is {names}.")


def _named(
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
) -> Models:
    """Loaded models. Raises ValueError where a dictionary could not tell them apart by name."""
    if config.hook_name is None or "," in config.hook_name:
        raise ValueError(
            f"hook_name is {config.hook_name!r}: loaded models are read at one hook point. Several "
            "are read in models that are given by name."
        )
    pair = ModelPair(base, finetuned, hook_name=config.hook_name, model_names=model_names)
    names = [site.model_name for site in pair.sites]
    if names[0] == names[1] and model_names is None:
        raise ValueError(
            f"both models call themselves {names[0]!r}, and a dictionary records its models by "
            "name. Say what they are with model_names=(base, finetuned): hub names or folders."
        )
    return pair.difference() if config.difference else pair


def _dtype(models: Models) -> str:
    source = models.source if isinstance(models, SiteDifference) else models
    assert isinstance(source, ComparedModels)
    weights = (p.dtype for p in source.models[0].parameters() if p.is_floating_point())
    return str(next(weights)).removeprefix("torch.")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
