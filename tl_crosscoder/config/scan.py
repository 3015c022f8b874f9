"""Settings of a layer scan: which hook points of which models, on which text.

No torch here: the command line reads these classes to print its help.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from tl_crosscoder.config.inputs import ModelsConfig, TextConfig
from tl_crosscoder.config.settings import NaturalInt, PositiveInt, Settings
from tl_crosscoder.config.training import without_run_fields
from tl_crosscoder.config.yaml import YamlConfig, read_mapping

_LAYER = "{layer}"


@dataclass(frozen=True, kw_only=True)
class ScanSettings(Settings):
    """Which hook points are compared, and on how much text."""

    hook_template: str = f"blocks.{_LAYER}.hook_resid_post"
    """Hook point of each layer, with {layer} for its number."""
    layers: tuple[NaturalInt, ...] | None = None
    """Layers that are looked at, from 0; None is all of them."""
    n_prompts: PositiveInt = 32
    """Documents to measure on; where there are chats, they alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if _LAYER not in self.hook_template:
            raise ValueError(
                f"hook_template is {self.hook_template!r}; it must hold {_LAYER} in the place of "
                f"the layer's number, such as 'blocks.{_LAYER}.hook_resid_post'."
            )

    def hook_names(self, n_layers: int) -> dict[int, str]:
        """Hook point of each layer that is looked at. Raises ValueError for a layer too many."""
        layers = sorted({*(range(n_layers) if self.layers is None else self.layers)})
        if not layers or layers[-1] >= n_layers:
            raise ValueError(
                f"layers is {self.layers}; the models have {n_layers}, numbered 0 to "
                f"{n_layers - 1}."
            )
        return {layer: self.hook_template.replace(_LAYER, str(layer)) for layer in layers}


@dataclass(frozen=True, kw_only=True)
class ScanConfig(YamlConfig, ScanSettings, TextConfig, ModelsConfig):
    """A layer scan: which models, which text, which hook points."""

    output: str = "layer-scan"
    """Folder for the table and the figure; an earlier scan there is replaced."""
    seed: NaturalInt = 0
    """Seed of the split, as in `train`, and of the resamples: held-out documents are not read."""
    hook_name: Annotated[str | None, tyro.conf.Suppress] = None
    """No effect here: all layers are looked at."""
    difference: Annotated[bool, tyro.conf.Suppress] = False
    """No effect here."""
    pack: Annotated[bool, tyro.conf.Suppress] = False
    """No effect here: each document has a context of its own."""

    @classmethod
    def from_yaml(
        cls, path: str | Path, *, default: Mapping[str, Any] | None = None
    ) -> "ScanConfig":
        """Settings from a file of its own, or the models and text of a training run's file.

        Raises as `YamlConfig.from_yaml` does.
        """
        del default  # the output has one
        return cls.from_mapping(without_run_fields(read_mapping(path), cls), name=str(path))
