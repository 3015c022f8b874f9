"""The public names and their modules; `__init__.py` imports each when it is first used."""

from tl_crosscoder.analysis.agreement import agreement_over_seeds as agreement_over_seeds
from tl_crosscoder.analysis.latents import rank_latents as rank_latents
from tl_crosscoder.analysis.measurement import Measurement as Measurement
from tl_crosscoder.analysis.measurement import measure as measure
from tl_crosscoder.config.inputs import TextSource as TextSource
from tl_crosscoder.config.presets import preset as preset
from tl_crosscoder.config.training import RunConfig as RunConfig
from tl_crosscoder.config.training import TrainConfig as TrainConfig
from tl_crosscoder.crosscoder.partition import Partition as Partition
from tl_crosscoder.crosscoder.sparsity import L1 as L1
from tl_crosscoder.crosscoder.sparsity import JumpReLU as JumpReLU
from tl_crosscoder.crosscoder.topk import BatchTopK as BatchTopK
from tl_crosscoder.crosscoder.topk import TopK as TopK
from tl_crosscoder.crosscoder.training import CrosscoderTraining as CrosscoderTraining
from tl_crosscoder.data.cache import ActivationCache as ActivationCache
from tl_crosscoder.data.documents import load_documents as load_documents
from tl_crosscoder.data.documents import split_documents as split_documents
from tl_crosscoder.data.tokens import TokenizedText as TokenizedText
from tl_crosscoder.data.tokens import tokenize as tokenize
from tl_crosscoder.demo import run_demo as run_demo
from tl_crosscoder.hub.convert import convert as convert
from tl_crosscoder.hub.export import export_concat as export_concat
from tl_crosscoder.hub.export import export_site as export_site
from tl_crosscoder.hub.export import export_transcoder as export_transcoder
from tl_crosscoder.hub.loading import Crosscoder as Crosscoder
from tl_crosscoder.interventions.behaviour import Behaviour as Behaviour
from tl_crosscoder.interventions.causal import causal_test as causal_test
from tl_crosscoder.interventions.context import InterventionContext as InterventionContext
from tl_crosscoder.interventions.live import ablated as ablated
from tl_crosscoder.interventions.live import steered as steered
from tl_crosscoder.interventions.patching import patching as patching
from tl_crosscoder.models.pair import ModelPair as ModelPair
from tl_crosscoder.models.site import Site as Site
from tl_crosscoder.notebook.layer_scan import scan as scan
from tl_crosscoder.notebook.model_diff import ModelDiff as ModelDiff
from tl_crosscoder.notebook.model_diff import diff as diff
from tl_crosscoder.notebook.model_diff import load_diff as load_diff
from tl_crosscoder.report.tokens import compared_tokens as compared_tokens
from tl_crosscoder.report.tokens import latent_tokens as latent_tokens
from tl_crosscoder.run.null import null_run as null_run
from tl_crosscoder.train.presets import Recipe as Recipe
from tl_crosscoder.train.trainer import Trainer as Trainer

__version__: str
__all__: list[str]
