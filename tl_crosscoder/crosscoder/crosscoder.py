"""`Crosscoder`: the trained dictionary, a JumpReLU SAE over the concatenation of its sites.

    pre_j = sum_m <W_enc^m[:, j], x^m> + b_enc_j     f_j = relu(pre_j) 1[pre_j > threshold_j]
    x̂^m   = sum_j f_j d_j^m + b_dec^m                              (Lindsey et al. 2024)

Input is raw activations, `[..., n_sites, d_model]` or flat `[..., d_in]`; codes are
`[..., d_sae]`, or with `sparse_codes` the entries above zero alone. Limit: stacked input needs
sites of equal width.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Float
from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.util import dtype_to_str, str_to_dtype
from safetensors import SafetensorError
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.crosscoder.config import ARCHITECTURE, CrosscoderConfig, check_memory
from tl_crosscoder.crosscoder.site_views import SiteViews
from tl_crosscoder.crosscoder.sparse.codes import Pattern, SparseCodes
from tl_crosscoder.files import CFG_NAME, WEIGHTS_NAME
from tl_crosscoder.models.devices import devices_of
from tl_crosscoder.models.pretrained import embedded_run
from tl_crosscoder.models.site import Site, site_columns
from tl_crosscoder.results.render import Section, as_html

_FUNCTIONS = {
    "reshape_fn_in", "reshape_fn_out",
    "run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out",
}  # fmt: skip
"""Attributes of a SAELens SAE that are closures, which no pickle holds."""
N_ROWS = 4096
"""Tokens whose codes are dense at a time."""


class Crosscoder(SiteViews, JumpReLUSAE):  # type: ignore[misc]
    """A trained crosscoder, in the file layout and with the methods of SAELens.

    `SAE.load_from_disk` and `SAE.from_pretrained` return this class once this package is
    imported; without it, load what `export_concat` wrote.
    """

    pretrained_loader: ClassVar["Callable[..., Crosscoder] | None"] = None
    """Finds a dictionary by name; set by `hub.loading` when it is imported."""

    def __init__(self, cfg: CrosscoderConfig, use_error_term: bool = False) -> None:
        check_memory(cfg, is_training=False)
        JumpReLUSAE.__init__(self, cfg, use_error_term)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Crosscoder":
        """Of `.half()`, `.bfloat16()`, `.cuda()`: inputs are cast to what the config says."""
        super()._apply(fn, recurse)
        self.dtype, self.device = self.W_dec.dtype, self.W_dec.device
        self.cfg.dtype, self.cfg.device = dtype_to_str(self.dtype), str(self.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What `pickle` and `torch.save` write: all but the functions that SAELens sets."""
        return {name: value for name, value in vars(self).items() if name not in _FUNCTIONS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._setup_activation_normalization()
        if self.cfg.reshape_activations == "hook_z":
            self.turn_on_forward_pass_hook_z_reshaping()
        else:
            self.turn_off_forward_pass_hook_z_reshaping()

    def encode(self, x: Tensor) -> Float[Tensor, "... d_sae"]:
        """Codes of raw activations; a latent is active where its code is above zero."""
        return JumpReLUSAE.encode(self, self.flatten(x))

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction, in the shape of the input."""
        return JumpReLUSAE.forward(self, self.flatten(x)).view_as(x)

    def rename_models_(self, sites: Sequence[Site]) -> None:
        """Take over the names, revisions and adapters of these sites: the same models elsewhere.

        Raises:
            ValueError: not as many sites, or sites of other hooks or widths.
        """
        theirs, ours = (
            [(s.name, s.hook_name, s.d_model) for s in of] for of in (sites, self.sites)
        )
        if [where for _, *where in theirs] != [where for _, *where in ours]:
            raise ValueError(f"the sites {theirs} are not those of this crosscoder, {ours}.")
        pairs = zip(sites, self.sites, strict=True)
        self.cfg.sites = tuple(replace(s, name=own.name, scale=own.scale) for s, own in pairs)
        self.cfg.metadata.sites = [s.to_dict() for s in self.cfg.sites]

    def extra_repr(self) -> str:
        """Sites and size, for `print`."""
        sites = ", ".join(
            f"{s.name}: {s.model_name} {s.hook_name} [{s.d_model}]" for s in self.sites
        )
        return f"d_sae={self.cfg.d_sae}, sites=({sites})"

    def _repr_html_(self) -> str:
        cfg, weights = self.cfg, self.W_dec
        title = (
            f"{type(self).__name__}: {cfg.d_sae:,} latents, d_in {cfg.d_in:,}, "
            f"{str(weights.dtype).removeprefix('torch.')} on {weights.device}"
        )
        return as_html([Section(title=title, columns=site_columns(self.sites, with_scales=True))])

    def save(self, path: str | Path) -> Path:
        """Write `cfg.json` and `sae_weights.safetensors` into the folder, each atomically."""
        path = files.user_path(path)
        files.write_tensors(path / WEIGHTS_NAME, self.state_dict())
        files.write_json(path / CFG_NAME, self.cfg.to_dict())
        return path

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu") -> "Crosscoder":
        """Read a folder that `save` wrote, or an embedded dictionary by its run's name.

        Raises:
            FileNotFoundError: no such folder, or not a dictionary.
            ValueError: a damaged file, non-finite weights, another kind of dictionary, or no such
                device.
        """
        path = embedded_run(path) or files.user_path(path)
        devices_of(device, 1)
        _check_folder(path)
        try:
            files.check_floats(path / WEIGHTS_NAME)
            crosscoder = cls.load_from_disk(path, device=device)
        except (SafetensorError, RuntimeError) as error:
            raise ValueError(
                f"{path / WEIGHTS_NAME} cannot be read ({error}): the file is truncated or does "
                "not belong to the cfg.json beside it. Copy it again, or train again."
            ) from error
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{path / CFG_NAME} cannot be read ({error}): it is damaged, or of a newer version "
                "of tl_crosscoder."
            ) from error
        bad = [n for n, p in crosscoder.state_dict().items() if not p.isfinite().all()]
        if bad:
            raise ValueError(
                f"{path / WEIGHTS_NAME} holds NaN or infinity in {bad}: the run that wrote it "
                "diverged. Use an earlier checkpoint, or train with a lower learning rate."
            )
        return crosscoder

    @classmethod
    def from_pretrained(  # positions and names are SAELens's
        cls,
        release: str,
        sae_id: str,
        device: str = "cpu",
        dtype: str = "float32",
        force_download: bool = False,
        converter: Callable[..., Any] | None = None,
        fold_W_dec_norm: bool = False,
        *,
        revision: str | None = None,
    ) -> "Crosscoder":
        """A dictionary of the registry, or of a repository of the hub; embedded ones are offline.

        Args:
            release: as `tl-crosscoder list` shows it (`tl_crosscoder-taboo`), or a repository
                `owner/name`, or `owner/name@v1` for a revision.
            sae_id: the dictionary in it (`batchtopk`), which in a repository is a folder.
            device: of the loaded dictionary.
            dtype: of its weights; thresholds suffer in less than float32.
            force_download: fetch again what is in the cache.
            converter: a loader of SAELens, used instead of all this.
            fold_W_dec_norm: divide decoder rows by their norm n_j, and multiply codes.
            revision: branch, tag or commit; None is the registry's, or else `main`.

        Raises:
            ValueError: no such release, dictionary or revision; a folder; no answer of the hub.
        """
        if converter is not None:
            return super().from_pretrained(
                release, sae_id, device, dtype, force_download, converter, fold_W_dec_norm
            )
        if cls.pretrained_loader is None:
            raise ValueError(
                "the registry of dictionaries is not loaded: take Crosscoder from tl_crosscoder "
                "itself, or import tl_crosscoder.hub.loading first."
            )
        crosscoder = cls.pretrained_loader(
            release, sae_id, device=device, revision=revision, force_download=force_download
        )
        crosscoder.cfg.dtype = dtype
        crosscoder.to(dtype=str_to_dtype(dtype))
        if fold_W_dec_norm:
            crosscoder.fold_W_dec_norm()
        return crosscoder

    def to_saelens(self) -> JumpReLUSAE:
        """A plain SAELens `JumpReLUSAE` over the concatenation, with the same codes (exact)."""
        sae = JumpReLUSAE(concatenation_config(self.cfg))
        sae.load_state_dict(self.state_dict())
        return sae


def concatenation_config(cfg: CrosscoderConfig) -> JumpReLUSAEConfig:
    """Config of the plain SAELens SAE with the same weights."""
    return JumpReLUSAEConfig(
        d_in=cfg.d_in,
        d_sae=cfg.d_sae,
        dtype=cfg.dtype,
        device=cfg.device,
        apply_b_dec_to_input=cfg.apply_b_dec_to_input,
        metadata=SAEMetadata.from_dict(cfg.metadata.to_dict()),
    )


@torch.no_grad()
def sparse_codes(crosscoder: Crosscoder, x: Float[Tensor, "batch *row"]) -> SparseCodes:
    """Entries of `crosscoder.encode(x)` above zero, in the order of tokens and then of latents.

    One pass over the pre-activations, where `encode` has four.
    """
    positions, values, d_sae = [], [], crosscoder.cfg.d_sae
    for i, rows in enumerate(x.split(N_ROWS)):
        pre = crosscoder.process_sae_in(crosscoder.flatten(rows)) @ crosscoder.W_enc
        pre += crosscoder.b_enc
        at = (pre > crosscoder.threshold.clamp(min=0)).flatten().nonzero().squeeze(1)
        positions.append(at + i * N_ROWS * d_sae)
        values.append(pre.flatten()[at])
    pattern = Pattern.at(torch.cat(positions), shape=(len(x), d_sae))
    return SparseCodes(pattern=pattern, values=torch.cat(values))


def _check_folder(path: Path) -> None:
    missing = [n for n in (CFG_NAME, WEIGHTS_NAME) if not (path / n).is_file()]
    if missing:
        lacks = f"it has no {' and no '.join(missing)}"
        raise FileNotFoundError(
            f"{path} is not a dictionary: {lacks if path.is_dir() else 'there is no such folder'}. "
            f"A dictionary is a folder with {CFG_NAME} and {WEIGHTS_NAME}, as `tl-crosscoder "
            "train` writes into its --output."
        )
    architecture = files.read_object(path / CFG_NAME).get("architecture")
    if architecture != ARCHITECTURE:
        raise ValueError(
            f"{path} holds a dictionary of architecture {architecture!r}, not {ARCHITECTURE!r}. "
            "Load it with sae_lens.SAE.load_from_disk."
        )


# A notebook that reloads this module registers a second time, which SAELens refuses.
if ARCHITECTURE not in SAE_CLASS_REGISTRY:
    register_sae_class(ARCHITECTURE, Crosscoder, CrosscoderConfig)
else:
    SAE_CLASS_REGISTRY[ARCHITECTURE] = (cast("type", Crosscoder), CrosscoderConfig)
