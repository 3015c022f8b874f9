"""Null pairs of a run: made without asking for anything, trained on and measured as the run was.

In `null/` of the run's folder: `samples.jsonl` (what the base writes at temperature 1 after prompts
of the run's text), `adapter/` (a LoRA fine-tune of the base on these, PEFT), and `self/` and
`identical/`, each a run on such a pair with the settings of the run itself. The loss is of sampled
tokens alone, of which the base is the best model there is: what the fine-tune changes is noise.
Contract: what is there complete is not made again. Limit: while the adapter is made there are three
copies of the model in memory, and then four.
"""

import json
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from tl_crosscoder import files
from tl_crosscoder.config.causal import AttributionQuestion
from tl_crosscoder.config.inputs import ModelsConfig, TextConfig
from tl_crosscoder.config.null import NullConfig
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.documents import load_documents
from tl_crosscoder.data.storage import read_manifest
from tl_crosscoder.data.text import Text, checked_text, write_documents
from tl_crosscoder.files import HELD_OUT_NAME, METRICS_NAME, NULL_NAME, RECORD_NAME
from tl_crosscoder.interventions.running import kl_divergence
from tl_crosscoder.locks import locked
from tl_crosscoder.models.devices import first_device, precision
from tl_crosscoder.models.loading import LoadOptions, load_site, load_trainable
from tl_crosscoder.models.lora import LoraTrained, lora_config, train_lora
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import Site
from tl_crosscoder.models.tokenizer import TokenIds, tokenizer_sha256
from tl_crosscoder.progress import note
from tl_crosscoder.results.render import wrapped
from tl_crosscoder.run.floor import Floor, measured, measured_floor
from tl_crosscoder.run.own_samples import Content, own_samples, prompt_documents, training_texts
from tl_crosscoder.run.run import Run
from tl_crosscoder.run.training import train

SETTINGS_NAME, SAMPLES_NAME, ADAPTER_NAME = "settings.json", "samples.jsonl", "adapter"
MAX_KL = 0.05
"""Nats a token between a model in memory and the one of its name: rounding makes far less."""
IDENTICAL = "`identical` (--kind identical), the base against itself, needs no fine-tune."


def null_run(
    run: Run, config: NullConfig | None = None, *, text: Text | None = None, resume: bool = False
) -> Floor:
    """Make a null pair of a run, train a dictionary on it as on the run's own, and measure both.

    Args:
        run: a finished run on two models.
        config: kind of pair, and how it is made.
        text: the run's text, where its record does not name it.
        resume: continue what `null/` holds; what is complete there is only measured.

    Raises:
        ValueError, FileNotFoundError: no text, a base that cannot be fine-tuned, no two models, or
            a null pair that is there already; before any long work.
        FloatingPointError, TrainingInterruptedError: as `train`.
    """
    config = config or NullConfig()
    folder, kind = run.path / NULL_NAME, config.kind
    content = None if text is None else checked_text(text)
    name = str(content) if isinstance(content, str | Path) else None
    how = run_config(run, text=name, output=folder / kind)
    content = None if isinstance(content, str | Path) else content
    _check(run, config, how, content, resume=resume)
    if (run.path / HELD_OUT_NAME).is_file():
        asked = AttributionQuestion(n_prompts=config.n_prompts)
        measured(run, asked)  # refuses text that is too little, before long work
    _say(run, config, how)
    with locked(folder):
        trained = None
        if kind == "self":
            trained = _fine_tuned(run, config, how, content)
            how = replace(how, adapter=str(folder / ADAPTER_NAME), finetuned=None)
        null = train(how, models=null_pair(run, how.adapter), text=content, resume=True)
    asked_of = {"kind": kind, "trained": trained, "n_prompts": config.n_prompts}
    return measured_floor(run, null, **asked_of)


# --- the settings of the run, for another pair ----------------------------------------------------


def run_config(run: Run, *, text: str | None, output: Path) -> RunConfig:
    """Settings of a run for a null pair of its base, without an adapter yet.

    Raises:
        ValueError: the run was trained by `Trainer`, whose record names no models and no text.
    """
    given = run.record["training"]
    if cache := given.get("cache"):
        made_with = read_manifest(files.user_path(cache))["made_with"]
        names = {f.name for c in (TextConfig, ModelsConfig) for f in fields(c)}
        given = given | {n: v for n, v in made_with.items() if n in names}
    known = {f.name for f in fields(RunConfig)}
    if not {"preset", "output"} <= given.keys():
        raise ValueError(
            f"{run.path} was trained with Trainer, and does not record its settings: a null pair "
            "is for runs of `diff`, `train` or the command line."
        )
    base, _ = _compared(run)
    changes: dict[str, Any] = {"cache": None, "output": str(output), "wandb_project": None}
    changes |= {"adapter": None, "finetuned": None, "finetuned_revision": None}
    if given.get("base") is not None:
        changes |= {"base": base.model_name, "finetuned": base.model_name, "device": run.device}
    if text is not None:
        changes |= {"text": text, "mixture": ()}
    kept = {n: v for n, v in given.items() if n in known}
    return RunConfig.from_mapping(kept | changes, name=str(run.path / RECORD_NAME))


def _compared(run: Run) -> tuple[Site, Site]:
    """Sites of base and fine-tuned model. Raises ValueError where there are not two models."""
    sites = [*(s.minus for s in run.crosscoder.sites if s.minus), *run.crosscoder.sites]
    base = sites[0]
    others = [s for s in sites if _model_of(s) != _model_of(base)]
    if not others:
        raise ValueError(
            f"{run.path} has one model, '{base.label}': a null pair is for a base and its "
            "fine-tune."
        )
    return base, others[-1]


def _model_of(site: Site) -> tuple[str | None, ...]:
    return site.model_name, site.revision, site.adapter


def _check(run: Run, config: NullConfig, how: RunConfig, content: Content, *, resume: bool) -> None:
    """Refuse, before any long work, what cannot be. Raises ValueError."""
    folder, base = run.path / NULL_NAME, _compared(run)[0]
    made = [f"{config.kind}/{RECORD_NAME}"]
    made += [SAMPLES_NAME, f"{ADAPTER_NAME}/*"] if config.kind == "self" else []
    if not resume and files.holds(folder, made):
        raise ValueError(
            f"{folder} already holds a null pair of this kind. Continue it with resume (--resume), "
            "or move the folder away for a new one."
        )
    if content is None and not how.sources:
        raise ValueError(
            f"{run.path} does not record its text, which was given in Python: give it again with "
            "text (--text)."
        )
    if config.kind == "self":
        check_fine_tuned(how)
        if base.adapter is not None:
            raise ValueError(
                f"the base of {run.path} is '{base.model_name}' with the adapter "
                f"'{base.adapter}', and a second one is not put on top. {IDENTICAL}"
            )


def check_fine_tuned(config: RunConfig) -> None:
    """Raise ValueError where the weights of a config's base cannot be fine-tuned."""
    if precision(config.dtype).is_4bit:
        raise ValueError(
            f"the models are in 4 bits ({config.dtype}), in which the base is not fine-tuned. "
            f"{IDENTICAL}"
        )


def _say(run: Run, config: NullConfig, how: RunConfig) -> None:
    """Say what is going to be done, and what it costs."""
    base, _ = _compared(run)
    took = _seconds(run)
    parts = [
        f"{config.n_samples:,} samples of {base.label}, of up to {config.max_new_tokens} tokens",
        f"a LoRA fine-tune of it on these, {config.n_steps:,} steps of {config.batch_size} texts",
    ]
    parts = parts if config.kind == "self" else []
    tokens = "" if how.n_tokens is None else f" on {how.n_tokens:,} activation pairs"
    took_text = "" if took is None else f" (the run's own took {took:,.0f} s)"
    parts += [f"a dictionary{tokens} with the run's settings{took_text}", "and its measures"]
    said = f"Noise floor, in {run.path / NULL_NAME}: {'; '.join(parts)}."
    note(wrapped(said))


def _seconds(run: Run) -> float | None:
    """How long the run trained; None where it does not say."""
    path, total, before = run.path / METRICS_NAME, 0.0, 0
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        row = json.loads(line)
        if not row.get("tokens_per_s"):
            return None
        total += (row["n_tokens"] - before) / row["tokens_per_s"]
        before = row["n_tokens"]
    return total or None


# --- the fine-tune on its own samples -------------------------------------------------------------


def _fine_tuned(run: Run, config: NullConfig, how: RunConfig, content: Content) -> LoraTrained:
    """Samples and adapter in `null/`, made where they are not there yet."""
    folder = run.path / NULL_NAME
    base, finetuned = _compared(run)
    _claim(folder, config, base, finetuned)
    adapter = folder / ADAPTER_NAME
    if adapter.is_dir():
        return LoraTrained.load(adapter)
    try:
        model = load_trainable(base, device=first_device(how.device), dtype=how.dtype)
        _check_same(model, run.models)
        lora = lora_config(finetuned.adapter, finetuned.revision, rank=config.rank)
        samples = folder / SAMPLES_NAME
        if not samples.is_file():
            held_out = run.path / HELD_OUT_NAME
            left_out = load_documents(held_out) if held_out.is_file() else ()
            documents = prompt_documents(how, content, config.n_samples, measured=left_out)
            write_documents(samples, [*own_samples(run.models, documents, config, how=how)])
        texts = training_texts(load_documents(samples))
        return train_lora(
            model,
            texts,
            adapter,
            lora=lora,
            how=config,
            base_name=base.model_name,
            show_progress=True,
        )
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"'{base.label}' cannot be fine-tuned: {error} {IDENTICAL}") from error


@torch.no_grad()
def _check_same(hf_model: Any, models: ModelPair) -> None:
    """Raise ValueError where the name of a base that was given in memory is another model's."""
    own = models.model(models.compared_names[0])
    tokens = torch.linspace(0, models.d_vocab - 1, 16, device=models.device).long()[None]
    logits = own(tokens), hf_model.eval()(input_ids=tokens.to(hf_model.device)).logits
    log_p, log_q = (x[0, :, : models.d_vocab].float().cpu().log_softmax(dim=-1) for x in logits)
    kl = kl_divergence(log_p, log_q).mean().item()
    if not kl < MAX_KL:
        raise ValueError(
            f"what is loaded by that name is another model than the one in memory (KL {kl:.2g} "
            "nats a token). Train the run on models that are given by name."
        )


def _claim(folder: Path, config: NullConfig, base: Site, finetuned: Site) -> None:
    """Compare with the settings that the pair was begun with, or write them down.

    Raises:
        ValueError: other settings.
    """
    names = {"base": _model_of(base), "like": finetuned.adapter}
    free = ("kind", "n_prompts")  # of what is measured, not of the pair
    settings = {k: v for k, v in asdict(config).items() if k not in free} | names
    path = folder / SETTINGS_NAME
    if path.is_file() and files.holds(folder, (SAMPLES_NAME, f"{ADAPTER_NAME}/*")):
        begun = files.read_object(path)
        files.check_same(begun, settings, what=f"{folder} was begun with other settings")
    else:
        files.write_json(path, settings)


# --- the pair -------------------------------------------------------------------------------------


def null_pair(run: Run, adapter: str | None) -> ModelPair:
    """The models of a run with the fine-tuned one exchanged; other fine-tunes are left out.

    Args:
        run: of the pair.
        adapter: on the base, in the place of the fine-tuned model; None is the base itself.
    """
    models = run.models
    base, finetuned = (models.model_sites[models.site_index(n)] for n in models.compared_names)
    base_model = models.model(base.name)
    other = replace(
        base, adapter=adapter, revision=None, base_revision=base.revision
    ) if adapter else base  # fmt: skip
    tokenizer_name = _tokenizer_name(models, base, finetuned)
    model = base_model
    if adapter is not None:
        training = run.record["training"]
        how = LoadOptions(
            device=first_device(run.device),
            precision=precision(training.get("dtype", "float32")),
            merge_adapter=training.get("merge_adapter"),
            tokenizer=models.tokenizer,
        )
        model = load_site(other, how)
    kept = {_model_of(base): (base, base_model), _model_of(finetuned): (other, model)}
    sites, own = [], []
    for site in models.model_sites:
        if _model_of(site) in kept:
            named, its_model = kept[_model_of(site)]
            at = {"name": site.name, "hook_name": site.hook_name, "d_model": site.d_model}
            sites.append(replace(named, **at))
            own.append(its_model)
    pair = ModelPair(
        *own, sites=sites, tokenizer=models.tokenizer, compared=models.compared_names
    )  # fmt: skip
    pair.tokenizer_name = tokenizer_name
    return pair.difference() if models.is_difference else pair


def _tokenizer_name(models: ModelPair, base: Site, finetuned: Site) -> str | None:
    """Where the tokenizer of both is found again; None where it is the base's own."""
    if models.tokenizer_name or isinstance(models.tokenizer, TokenIds):
        return models.tokenizer_name
    own = models.model(base.name).tokenizer
    both = [
        (tokenizer_sha256(t), t.chat_template) for t in (own, models.tokenizer) if t is not None
    ]  # fmt: skip
    return None if len(set(both)) == 1 and len(both) == 2 else finetuned.label
