"""Crosscoder model diffing for TransformerLens: what did fine-tuning change inside this model?

    import tl_crosscoder as tlc

    diff = tlc.diff("org/base", "org/tuned", hook_name="blocks.9.hook_resid_post", text="t.jsonl")
    diff.top(10)

Importing this package is cheap and silent; each name loads what it needs when it is first used.
SAELens finds our dictionaries (`SAE.load_from_disk`) once one of these names has been used, or at
import if SAELens was imported before.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tl_crosscoder.analysis.agreement import agreement, agreement_over_seeds
    from tl_crosscoder.analysis.example_database import ExampleDatabase
    from tl_crosscoder.analysis.examples import examples
    from tl_crosscoder.analysis.geometry import (
        decoupled_pairs,
        similar_latents,
    )
    from tl_crosscoder.analysis.latent_scaling import LatentScaling
    from tl_crosscoder.analysis.latents import rank_latents
    from tl_crosscoder.analysis.lens import direction_logits, logit_effect
    from tl_crosscoder.analysis.measurement import Measurement, measure
    from tl_crosscoder.analysis.patchscope import patchscope
    from tl_crosscoder.analysis.saelens_evals import SiteSAE, sae_bridge, site_evals
    from tl_crosscoder.baselines.difference import activation_difference, difference_pca
    from tl_crosscoder.baselines.logit_amplification import amplified_text
    from tl_crosscoder.config.inputs import ContrastiveConfig, Masks, TextSource
    from tl_crosscoder.config.presets import preset
    from tl_crosscoder.config.training import HarvestConfig, RunConfig, TrainConfig
    from tl_crosscoder.crosscoder.config import (
        AuxK,
        CrosscoderConfig,
        CrosscoderTrainingConfig,
        DeltaLoss,
    )
    from tl_crosscoder.crosscoder.crosscoder import Crosscoder
    from tl_crosscoder.crosscoder.partition import Partition
    from tl_crosscoder.crosscoder.sparsity import L1, JumpReLU
    from tl_crosscoder.crosscoder.topk import BatchTopK, TopK
    from tl_crosscoder.crosscoder.training import CrosscoderTraining
    from tl_crosscoder.data.cache import ActivationCache
    from tl_crosscoder.data.cache_writer import run_harvest, write_cache
    from tl_crosscoder.data.contrastive import ContrastiveSampler
    from tl_crosscoder.data.documents import load_documents, split_documents
    from tl_crosscoder.data.mixture import tokenize_mixture
    from tl_crosscoder.data.tokens import TokenizedText, tokenize
    from tl_crosscoder.demo import run_demo
    from tl_crosscoder.hub.convert import convert
    from tl_crosscoder.hub.export import export_concat, export_site, export_transcoder
    from tl_crosscoder.interventions.base_estimate import BaseEstimate
    from tl_crosscoder.interventions.behaviour import Behaviour, Predictions, Question
    from tl_crosscoder.interventions.causal import causal_test
    from tl_crosscoder.interventions.context import InterventionContext
    from tl_crosscoder.interventions.latent_edits import activation_norms
    from tl_crosscoder.interventions.live import ablated, edited, steered
    from tl_crosscoder.interventions.mitigation import export_mitigation, measure_estimate
    from tl_crosscoder.interventions.patching import patching
    from tl_crosscoder.interventions.trials import CausalTest, ControlSettings, run_trials
    from tl_crosscoder.interventions.weight_edit import ablation_weights
    from tl_crosscoder.models.pair import ModelPair
    from tl_crosscoder.models.saelens import HookedSite, PairView
    from tl_crosscoder.models.site import Site
    from tl_crosscoder.notebook.model_diff import ModelDiff, diff, load_diff
    from tl_crosscoder.report.figures import relative_norm_histogram, run_figures
    from tl_crosscoder.report.tokens import (
        compared_tokens,
        edited_tokens,
        example_tokens,
        latent_tokens,
        next_tokens,
    )
    from tl_crosscoder.run.contrastive import write_contrastive
    from tl_crosscoder.train.presets import Recipe
    from tl_crosscoder.train.trainer import Trainer, fit_together

__all__ = [
    "L1",
    "ActivationCache",
    "AuxK",
    "BaseEstimate",
    "BatchTopK",
    "Behaviour",
    "CausalTest",
    "ContrastiveConfig",
    "ContrastiveSampler",
    "ControlSettings",
    "Crosscoder",
    "CrosscoderConfig",
    "CrosscoderTraining",
    "CrosscoderTrainingConfig",
    "DeltaLoss",
    "ExampleDatabase",
    "HarvestConfig",
    "HookedSite",
    "InterventionContext",
    "JumpReLU",
    "LatentScaling",
    "Masks",
    "Measurement",
    "ModelDiff",
    "ModelPair",
    "PairView",
    "Partition",
    "Predictions",
    "Question",
    "Recipe",
    "RunConfig",
    "Site",
    "SiteSAE",
    "TextSource",
    "TokenizedText",
    "TopK",
    "TrainConfig",
    "Trainer",
    "ablated",
    "ablation_weights",
    "activation_difference",
    "activation_norms",
    "agreement",
    "agreement_over_seeds",
    "amplified_text",
    "causal_test",
    "compared_tokens",
    "convert",
    "decoupled_pairs",
    "diff",
    "difference_pca",
    "direction_logits",
    "edited",
    "edited_tokens",
    "example_tokens",
    "examples",
    "export_concat",
    "export_mitigation",
    "export_site",
    "export_transcoder",
    "fit_together",
    "latent_tokens",
    "load_diff",
    "load_documents",
    "logit_effect",
    "measure",
    "measure_estimate",
    "next_tokens",
    "patching",
    "patchscope",
    "preset",
    "rank_latents",
    "relative_norm_histogram",
    "run_demo",
    "run_figures",
    "run_harvest",
    "run_trials",
    "sae_bridge",
    "similar_latents",
    "site_evals",
    "split_documents",
    "steered",
    "tokenize",
    "tokenize_mixture",
    "write_cache",
    "write_contrastive",
]

__version__ = "0.1.0"

_MODULES = {
    "analysis.agreement": (
        "agreement",
        "agreement_over_seeds",
    ),
    "analysis.example_database": ("ExampleDatabase",),
    "analysis.examples": ("examples",),
    "analysis.geometry": (
        "decoupled_pairs",
        "similar_latents",
    ),
    "analysis.latent_scaling": ("LatentScaling",),
    "analysis.latents": ("rank_latents",),
    "analysis.lens": (
        "direction_logits",
        "logit_effect",
    ),
    "analysis.measurement": (
        "Measurement",
        "measure",
    ),
    "analysis.patchscope": ("patchscope",),
    "analysis.saelens_evals": (
        "SiteSAE",
        "site_evals",
        "sae_bridge",
    ),
    "baselines.difference": ("activation_difference", "difference_pca"),
    "baselines.logit_amplification": ("amplified_text",),
    "config.presets": ("preset",),
    "config.inputs": (
        "Masks",
        "TextSource",
        "ContrastiveConfig",
    ),
    "config.training": (
        "HarvestConfig",
        "RunConfig",
        "TrainConfig",
    ),
    "crosscoder.config": (
        "AuxK",
        "CrosscoderConfig",
        "CrosscoderTrainingConfig",
        "DeltaLoss",
    ),
    "crosscoder.partition": ("Partition",),
    "crosscoder.sparsity": (
        "L1",
        "JumpReLU",
    ),
    "crosscoder.topk": (
        "BatchTopK",
        "TopK",
    ),
    "crosscoder.training": ("CrosscoderTraining",),
    "data.cache": ("ActivationCache",),
    "data.cache_writer": (
        "run_harvest",
        "write_cache",
    ),
    "data.contrastive": ("ContrastiveSampler",),
    "data.documents": (
        "load_documents",
        "split_documents",
    ),
    "data.mixture": ("tokenize_mixture",),
    "data.tokens": (
        "TokenizedText",
        "tokenize",
    ),
    "demo": ("run_demo",),
    "hub.convert": ("convert",),
    "hub.export": (
        "export_concat",
        "export_site",
        "export_transcoder",
    ),
    "hub.loading": ("Crosscoder",),  # with the registry, for `Crosscoder.from_pretrained`
    "interventions.base_estimate": ("BaseEstimate",),
    "interventions.behaviour": (
        "Behaviour",
        "Question",
        "Predictions",
    ),
    "interventions.causal": ("causal_test",),
    "interventions.context": ("InterventionContext",),
    "interventions.live": (
        "ablated",
        "edited",
        "steered",
    ),
    "interventions.latent_edits": ("activation_norms",),
    "interventions.mitigation": (
        "export_mitigation",
        "measure_estimate",
    ),
    "interventions.patching": ("patching",),
    "interventions.trials": (
        "CausalTest",
        "ControlSettings",
        "run_trials",
    ),
    "interventions.weight_edit": ("ablation_weights",),
    "models.pair": ("ModelPair",),
    "models.saelens": (
        "PairView",
        "HookedSite",
    ),
    "models.site": ("Site",),
    "notebook.model_diff": (
        "ModelDiff",
        "diff",
        "load_diff",
    ),
    "report.figures": (
        "relative_norm_histogram",
        "run_figures",
    ),
    "report.tokens": (
        "compared_tokens",
        "edited_tokens",
        "example_tokens",
        "latent_tokens",
        "next_tokens",
    ),
    "run.contrastive": ("write_contrastive",),
    "train.presets": ("Recipe",),
    "train.trainer": (
        "Trainer",
        "fit_together",
    ),
}
_LAZY = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "sae_lens" in sys.modules:
    importlib.import_module(f"{__name__}.crosscoder.training")
