"""Which models and hook points, as flat fields.

No torch here: the command line reads this class to print its help.

The choices that the command line offers and the dictionary checks, spelt once.

No torch here: the command line reads them to print its help.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class ModelsConfig:
    """The models that are compared, and where."""

    base: str | None = None
    """Base model: a Hugging Face name or a local folder."""
    finetuned: str | None = None
    """Fine-tuned model: a name or a folder; or give `adapter`. Several, such as SFT and RL, with
    commas between them."""
    adapter: str | None = None
    """LoRA adapter (PEFT) on the base model: a name or a folder; several with commas between."""
    merge_adapter: bool | None = None
    """Merge the adapter into the weights, or run it beside them; None merges unless the base is
    4-bit."""
    hook_name: str | None = None
    """Hook point whose activations are read in both models, e.g. blocks.13.hook_resid_post.
    Several, with commas between them, are read in every model; then the base alone is enough."""
    difference: bool = False
    """Train on the difference of the two sites alone; the preset diff-sae implies it."""
    revision: str | None = None
    """Revision of the base model on the hub."""
    finetuned_revision: str | None = None
    """Revision of the fine-tuned model or adapter on the hub; of several, as many with commas."""
    device: str = "cpu"
    """Device of the models and the crosscoder; or one for each model with commas between, the
    crosscoder on the first."""
    dtype: str = "float32"
    """Number format of the models: float32, bfloat16, float16, or nf4 (4-bit, with bitsandbytes).
    The crosscoder trains in float32."""


Reconstruction = Literal["sum", "mean", "norm"]
DeltaScale = Literal["absolute", "relative"]
Kernels = Literal["auto", "dense"]
ComputeDtype = Literal["bfloat16"]
StoreDtype = Literal["float32", "bfloat16", "float16", "int8"]
