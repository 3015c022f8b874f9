"""`scan`: at which layer to look for what fine-tuning changed, before a dictionary is trained.

    tl_crosscoder.scan("org/base", "org/tuned", text="text.jsonl")

Contract: models and text as `diff` takes them; nothing is written. Limit: two models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tl_crosscoder.config.scan import ScanConfig
from tl_crosscoder.data.text import Text, checked_text
from tl_crosscoder.interventions.layer_scan_result import LayerScan
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import ANY_HOOK
from tl_crosscoder.notebook.model_diff import Model, names_of
from tl_crosscoder.run.scan import scan_run


def scan(
    base: Model,
    finetuned: Model | None = None,
    *,
    text: Text,
    adapter: str | Path | None = None,
    layers: Sequence[int] | None = None,
    device: str | None = None,
    model_names: tuple[str, str] | None = None,
    **settings: Any,
) -> LayerScan:
    """Measure how much of the change passes each layer, and recommend a hook point.

    Args:
        base: the base model: a hub name, a folder, an embedded name, or a loaded TransformerLens
            model of either kind.
        finetuned: the fine-tuned model, likewise.
        text: a file, a folder or a `datasets` name; a list of strings or of documents; or a
            `TokenizedText`. What a training would hold out is not read.
        adapter: a LoRA adapter on the base, in place of `finetuned`.
        layers: which are looked at, from 0; None is all.
        device: of models that are loaded here; None is the CPU.
        model_names: what loaded models are called.
        settings: any other field of `ScanConfig`, such as `hook_template`, `n_prompts` or `dtype`.

    Raises:
        ValueError, FileNotFoundError: bad input, before any long work.
    """
    settings |= {"layers": None if layers is None else tuple(layers), "device": device}
    settings |= {"adapter": None if adapter is None else str(adapter)}
    given = {name: value for name, value in settings.items() if value is not None}
    given |= names_of(base, finetuned, given, model_names)
    content = checked_text(text, on_bad_document=given.get("on_bad_document", "error"))
    if isinstance(content, str | Path):
        given["text"], content = str(content), None
    config, models = ScanConfig.from_mapping(given, name="scan"), None
    if config.base is None:
        both: Any = base, finetuned
        models = ModelPair(*both, hook_name=ANY_HOOK, model_names=model_names)
    return scan_run(config, models=models, content=content)
