"""The text of a run that Python starts: a file's name, documents, or contexts.

Contract: what is trained on, what is measured on, and documents from which the latter is made again
to the token, as a run's folder keeps them. Limit: documents and contexts are in memory.

A run started from Python with whatever is at hand: names or loaded models, any kind of text.

Contract: what it leaves in its folder is what `run_diff` leaves, so the command line opens it; text
that is no file is kept there as far as it is held out. Sizes that are not given follow from the
text and the models, see `sized`. Limit: two loaded models and one hook point; names take as many as
`RunConfig` does.
"""

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import torch

from tl_crosscoder.config.presets import preset, preset_from, preset_name
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.documents import Document, load_documents, split_documents
from tl_crosscoder.data.harvest import with_norm_limits
from tl_crosscoder.data.tokens import TokenizedText, tokenize
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.models.tokenizer import tokenizer_sha256
from tl_crosscoder.run.estimate import estimate
from tl_crosscoder.run.sources import load_source
from tl_crosscoder.run.text import RunText, check_text, held_out_text, text_of_run, tokens_of
from tl_crosscoder.run.training import check_models, train_and_measure
from tl_crosscoder.train.presets import recipe_of
from tl_crosscoder.train.trainer import crosscoder_config

Text = str | Path | Iterable[str | Document] | TokenizedText
"""A file, folder or `datasets` name; strings or documents; or contexts."""

_LONGEST_NAME = 300


def checked_text(text: Any) -> str | Path | TokenizedText | list[Document]:
    """The text by its type, before anything is loaded.

    Raises:
        ValueError: no text, or text itself in place of a file's name.
    """
    if isinstance(text, TokenizedText | Path):
        return text
    if isinstance(text, str):
        if "\n" in text or len(text) > _LONGEST_NAME:
            raise ValueError(
                f"text is a string of {len(text):,} characters that is no name: give a file, a "
                "`datasets` name, or a list of documents such as [text_1, text_2]."
            )
        return text
    is_one = not isinstance(text, Iterable) or isinstance(text, Mapping | bytes)
    documents: list[Any] = [text] if is_one or hasattr(text, "iterrows") else [*text]
    for document in documents:
        if not _is_document(document):
            raise ValueError(
                f"the text holds a {type(document).__name__}, {repr(document)[:80]}: give a file, "
                "a `datasets` name, a list of strings or of documents ({'text': str} or "
                "{'messages': [...]}), or a TokenizedText."
            )
    found = load_documents(documents)
    split_documents(found[:2])  # refuses fewer than two
    return found


def _is_document(value: Any) -> bool:
    keys = ("text", "messages", "input_ids")
    return isinstance(value, str) or (isinstance(value, Mapping) and any(k in value for k in keys))


def read_text(
    config: RunConfig,
    models: ActivationSource,
    content: str | Path | TokenizedText | list[Document],
) -> RunText:
    """Train and held-out text of a run on these models; `content` is checked.

    Raises: as `text_of_run` does, and for contexts with other masks than those of the config.
    """
    if isinstance(content, str | Path):
        return text_of_run(config, models)
    tokenizer = models.tokenizer
    if isinstance(content, TokenizedText):
        made = _split(content, config, tokenizer)
    else:
        rest, kept = split_documents(content, held_out=config.held_out, seed=config.seed)
        n = config.n_measured_tokens
        made = RunText(
            training=tokens_of(config, rest, tokenizer),
            held_out=held_out_text(config, kept, tokenizer, n_tokens=n),
            held_out_documents=kept,
        )
    limited = with_norm_limits(
        models,
        made.training,
        multiple=config.max_norm_multiple,
        batch_size=config.harvest_batch_size,
    )
    held_out = replace(made.held_out, norm_limits=limited.norm_limits)
    return replace(made, training=limited, held_out=held_out)


def _split(text: TokenizedText, config: RunConfig, tokenizer: Any) -> RunText:
    """Whole contexts, at random; the held-out ones as documents of ids, which make them again.

    Raises ValueError for a single context, and for masks other than those of the config: whoever
    opens the run would measure other tokens.
    """
    if len(text) < 2:
        raise ValueError(
            f"the text has {len(text)} context; at least 2 are needed to keep some for measuring."
        )
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(config.seed))
    n_held_out = min(max(1, round(config.held_out * len(text))), len(text) - 1)
    n_measured = max(1, config.n_measured_tokens // text.context_size)
    kept = text[order[: min(n_held_out, n_measured)].sort().values]
    documents = [*_as_documents(kept, tokenizer_sha256(tokenizer))]
    how = {"context_size": text.context_size, "pack": False, "masks": config}
    again = tokenize(documents, tokenizer, **how)
    if not (torch.equal(again.tokens, kept.tokens) and torch.equal(again.dropped, kept.dropped)):
        raise ValueError(
            f"the contexts leave out other tokens ({kept.mask_counts}) than the settings of this "
            f"run say ({again.mask_counts}). Give diff the masks that they were made with, such as "
            "drop_template=True."
        )
    rest = text[order[n_held_out:].sort().values]
    return RunText(training=rest, held_out=kept, held_out_documents=documents)


def _as_documents(text: TokenizedText, tokenizer: str) -> Iterator[Document]:
    for i, n in enumerate(text.lengths.tolist()):
        yield {
            "input_ids": text.tokens[i, :n].tolist(),
            "role_ids": text.role_ids[i, :n].tolist(),
            "source": text.sources[int(text.source_ids[i, n - 1])],
            "tokenizer": tokenizer,
        }


Model = str | Path | HookedModel
"""A name, a folder, or a model of either TransformerLens kind."""
Models = ModelPair

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
        given = _with_preset(given)
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
        recipe_of(config.preset, n_steps=config.n_steps)
        models = load_source(config) if named else _pair(base, finetuned, config, model_names)
        changes: dict[str, Any] = {} if named else {"dtype": _dtype(models)}
        if "context_size" not in given:
            changes["context_size"] = min(config.context_size, models.n_ctx)
        config = replace(config, **changes)
        crosscoder_config(models, config, config.preset)  # refuses what cannot be
        if isinstance(content, TokenizedText):
            config = replace(config, context_size=content.context_size, pack=False)
        read = read_text(config, models, content)
        config = sized(config, read.training.n_tokens, models.d_model, given)
        return cls(config=config, models=models, text=read)

    def describe(self) -> str:
        """One line: what is going to be done, and of named models for how long, about."""
        config, sites = self.config, self.models.sites
        recipe = recipe_of(config.preset, n_steps=config.n_steps)
        named = [*(s.minus for s in sites if s.minus), *sites]
        models = " and ".join(dict.fromkeys(s.label for s in named))
        hooks = ", ".join(dict.fromkeys(s.hook_name for s in named))
        k = getattr(recipe.sparsity, "k", None)
        d_sae = crosscoder_config(self.models, config, recipe).d_sae
        seconds = estimate(config).seconds if config.base is not None else None
        return (
            f"{models} at {hooks}: {preset_name(config.preset)}, {d_sae:,} latents"
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
    k = getattr(config.preset, "k", 16)
    n_latents = max(round(4 * k), n_tokens // TOKENS_PER_LATENT)
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


def _with_preset(given: dict[str, Any]) -> dict[str, Any]:
    """Settings with options such as `k` moved into the preset that has them."""
    chosen = preset_from(given.get("preset", "batchtopk"))
    options = {f.name for f in fields(chosen)} & given.keys()
    own = {name: given[name] for name in options}
    rest = {name: value for name, value in given.items() if name not in options}
    return rest | {"preset": preset(preset_name(chosen), **(asdict(chosen) | own))}


def _check_settings(given: Mapping[str, Any]) -> None:
    known = {f.name for f in fields(RunConfig)} - {*_NOT_HERE}
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3)
            raise ValueError(
                f"diff has no setting {name!r}"
                + (f"; nearest: {', '.join(map(repr, near))}" if near else "")
                + ". Settings are the fields of tl_crosscoder.RunConfig and the options of preset "
                f"{preset_name(given['preset'])!r}; a cache or a mixture of texts is trained on "
                "with run_diff, and opened with load_diff."
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
    names = [site.model_name for site in pair.model_sites]
    if names[0] == names[1] and model_names is None:
        raise ValueError(
            f"both models call themselves {names[0]!r}, and a dictionary records its models by "
            "name. Say what they are with model_names=(base, finetuned): hub names or folders."
        )
    return pair.difference() if config.difference else pair


def _dtype(models: Models) -> str:
    weights = (p.dtype for p in models.models[0].parameters() if p.is_floating_point())
    return str(next(weights)).removeprefix("torch.")


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"
