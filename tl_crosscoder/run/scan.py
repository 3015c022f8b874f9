"""A layer scan of two models on a text: of its own, or before a training that names no hook point.

Contract: training documents are read, none that is held out; models are loaded once, and read at
the chosen hook afterwards (`ModelPair.at`). Limit: the compared two of several models.
"""

from dataclasses import replace

from tl_crosscoder.config.scan import ScanConfig, ScanSettings
from tl_crosscoder.config.training import RunConfig
from tl_crosscoder.data.documents import Document
from tl_crosscoder.data.text import check_text, training_prompts
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.interventions.behaviour import Predictions
from tl_crosscoder.interventions.layer_scan import scan_layers
from tl_crosscoder.interventions.layer_scan_result import LayerScan
from tl_crosscoder.interventions.running import kinds_of, with_predictions
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.site import ANY_HOOK

_MORE = 4
"""Documents that are read for each that is measured on: not all have something to predict."""


def scan_run(
    config: ScanConfig,
    *,
    models: ModelPair | None = None,
    content: TokenizedText | list[Document] | None = None,
) -> LayerScan:
    """Load what the config names, and scan the layers.

    Args:
        config: models, text and hook points.
        models: loaded models, in place of the names in the config.
        content: documents or contexts, in place of the name in the config.

    Raises:
        ValueError, FileNotFoundError: bad input; what can be, before models load.
    """
    if content is None:
        check_text(config)
    if models is None:
        models = ModelPair.from_config(replace(config, hook_name=ANY_HOOK, difference=False))
    return scanned(config, models, content, settings=config)


def scanned(
    config: RunConfig | ScanConfig,
    models: ModelPair,
    content: TokenizedText | list[Document] | None,
    *,
    settings: ScanSettings,
) -> LayerScan:
    """Scan the layers on training documents.

    Raises:
        ValueError: a text without a prediction, or as `scan_layers` does.
    """
    n = settings.n_prompts
    text = training_prompts(config, models, content, n=_MORE * n)
    found = with_predictions(text, kinds_of(text))[:n]
    if not len(found):
        raise ValueError(
            f"none of {len(text):,} documents has a token to predict: each is one token long, so "
            "that nothing can be said of any layer. Give longer documents."
        )
    return scan_layers(
        models,
        Predictions.of(found),
        settings=settings,
        part="training documents",
        seed=config.seed,
        show_progress=True,
    )
