"""A site of a crosscoder as an SAE of SAELens, attached to its model or run by the evaluator.

Contract: `SiteSAE` encodes with all sites, as in training, and decodes one. `site_evals` runs
SAELens's `run_evals` with it, a row a site: the numbers that SAEs are reported with. SAELens leaves
out tokens by their ids (BOS, EOS, padding), not by our masks; a prediction belongs to the token it
is made from, and tokens left out keep their activation. Limit: SAELens holds codes
`[batch, pos, d_sae]` densely, and knows no padding.
"""

import importlib.metadata
import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.util import get_special_token_ids
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.crosscoder.site_views import check_source
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.hooked import HookedModel
from tl_crosscoder.models.pair import ModelPair
from tl_crosscoder.models.saelens import HookedSite, SiteView
from tl_crosscoder.results.tables import TableOfRows


@dataclass(frozen=True, kw_only=True)
class SiteEval:
    """SAELens's metrics of one site, under their names there; means over tokens."""

    site: str
    explained_variance: float
    """1 - sum ||e||^2 / sum ||x - mean||^2: our FVE of the site, on SAELens's tokens."""
    mse: float
    """||e||^2, summed over dimensions."""
    cossim: float
    """Cosine of x and its reconstruction."""
    l0: float
    l1: float
    l2_norm_in: float
    l2_norm_out: float
    l2_ratio: float
    """||x̂|| / ||x||."""
    relative_reconstruction_bias: float
    """sum ||x̂||^2 / sum <x, x̂>; averaged over batches."""
    ce_loss_score: float
    """1 where the loss with x̂ is that with x, 0 where it is that with zeros."""
    ce_loss_without_sae: float
    """Nats a predicted token, the site's model unchanged."""
    ce_loss_with_sae: float
    ce_loss_with_ablation: float
    """With zeros at the hook."""
    kl_div_score: float
    """1 - KL with x̂ / KL with zeros."""
    kl_div_with_sae: float
    """KL(unchanged || with x̂), nats a token."""
    kl_div_with_ablation: float


@dataclass(frozen=True, kw_only=True)
class SiteEvals(TableOfRows):
    """One row a site."""

    ROW: ClassVar[type] = SiteEval
    rows: tuple[SiteEval, ...]
    n_tokens: int
    """Kept tokens."""
    n_contexts: int
    left_out_ids: tuple[int, ...]
    """Ids of the tokens that SAELens left out."""
    sae_lens_version: str

    def row(self, site: str) -> SiteEval:
        """Row of one site. Raises ValueError for an unknown one."""
        rows = {row.site: row for row in self.rows}
        if site not in rows:
            raise ValueError(f"site {site!r} was not evaluated; {[*rows]} were.")
        return rows[site]


class _Encoder(NamedTuple):
    """What a `SiteSAE` encodes with; a tuple, so that its weights are not those of the SAE."""

    crosscoder: Crosscoder
    view: SiteView | HookedSite


class SiteSAE(JumpReLUSAE):
    """A crosscoder seen from one site: an SAE of SAELens over the activation of that site.

    It decodes the site, and encodes all. With a `HookedSite` it is attached to the site's model:

        sae = SiteSAE(crosscoder, HookedSite(pair, "finetuned"))
        model = sae_bridge(pair.model("finetuned"))  # or the HookedSAETransformer of the pair
        model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)

    `...hook_sae_acts_post` then holds the crosscoder's codes (`model.get_sae_hook_name(sae)` in a
    bridge); `hook_sae_acts_pre` is silent; models in bfloat16 take `sae.to(torch.bfloat16)`. With a
    `SiteView` it serves wherever SAELens runs that model and then encodes, `run_evals` with an
    `ActivationsStore.from_sae(view, sae, dataset)` included, and not where activations are
    shuffled.

    Raises:
        ValueError: a dictionary of other models.
    """

    def __init__(self, crosscoder: Crosscoder, view: SiteView | HookedSite):
        check_source(view.pair, crosscoder)
        metadata = crosscoder.cfg.metadata
        super().__init__(
            JumpReLUSAEConfig(
                d_in=view.site.d_model,
                d_sae=crosscoder.cfg.d_sae,
                dtype=crosscoder.cfg.dtype,
                device=str(crosscoder.W_dec.device),
                apply_b_dec_to_input=crosscoder.cfg.apply_b_dec_to_input,
                reshape_activations="hook_z" if view.hook_name.endswith("_z") else "none",
                metadata=SAEMetadata(
                    hook_name=view.hook_name,
                    hook_head_index=None,
                    model_name=view.site.label,
                    prepend_bos=True,
                    context_size=metadata.context_size,
                ),
            )
        )
        self.encoder = _Encoder(crosscoder, view)
        at = view.position
        weights = {
            "W_enc": crosscoder.encoder(at),
            "W_dec": crosscoder.decoder(at),
            "b_dec": crosscoder.decoder_bias(at),
            "b_enc": crosscoder.b_enc,
            "threshold": crosscoder.threshold,
        }
        self.load_state_dict(weights)

    def encode(self, x: Float[Tensor, "batch pos *d_model"]) -> Float[Tensor, "batch pos d_sae"]:
        """Codes of all sites.

        Raises ValueError where the other sites' activations are not known; see `activations_with`.
        """
        crosscoder, view = self.encoder
        acts = [part.to(crosscoder.W_enc) for part in view.activations_with(x)]
        self.reshape_fn_in(x)  # notes the heads, which decode gives back
        acts[view.position] = self.hook_sae_input(acts[view.position])
        codes = crosscoder.encode(torch.cat(acts, dim=-1))
        return self.hook_sae_acts_post(codes.to(self.dtype))

    def save_model(self, path: Any) -> Any:
        """Refused: without the other sites the file would be another dictionary."""
        raise ValueError(
            f"one site is not saved (to {path}): its encoder needs the other sites. Save the "
            "crosscoder, and make its SiteSAE again."
        )


def site_evals(
    models: ModelPair,
    crosscoder: Crosscoder,
    text: TokenizedText,
    *,
    sites: tuple[str, ...] | None = None,
    exclude_special_tokens: bool = True,
    batch_size: int = 8,
    show_progress: bool = False,
) -> SiteEvals:
    """Run SAELens's evaluator on sites of a crosscoder, over a whole text.

    Args:
        models: those the crosscoder was trained on.
        crosscoder: of one site or more.
        text: packed.
        sites: names; None is all.
        exclude_special_tokens: leave out BOS, EOS and padding tokens, SAELens's default. A model
            without BOS has its attention sink at an ordinary first token, which is kept.
        batch_size: contexts a forward pass.
        show_progress: with progress bars.

    Raises:
        ValueError: a diff-SAE, a dictionary of other models, an unknown site, no text, or text with
            padding.
    """
    _check(models, crosscoder, text)
    left_out = sorted(get_special_token_ids(models.tokenizer)) if exclude_special_tokens else []
    n_batches = math.ceil(len(text) / batch_size)
    config = EvalConfig(
        batch_size_prompts=batch_size,
        n_eval_reconstruction_batches=n_batches,
        n_eval_sparsity_variance_batches=n_batches,
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    rows = []
    for name in sites or [site.name for site in models.model_sites]:
        view = SiteView(models, name)
        metrics, _ = run_evals(
            SiteSAE(crosscoder, view),
            cast(ActivationsStore, _Contexts(text, models.device, batch_size)),
            view,
            ActivationScaler(),
            eval_config=config,
            exclude_special_tokens=left_out or False,
            verbose=show_progress,
        )
        values = {k: float(v) for group in metrics.values() for k, v in group.items()}
        own = {f.name: values[f.name] for f in fields(SiteEval) if f.name != "site"}
        rows.append(SiteEval(site=name, **own))
    is_left_out = torch.isin(text.tokens, torch.tensor(left_out, dtype=text.tokens.dtype))
    return SiteEvals(
        rows=tuple(rows),
        n_tokens=int((~is_left_out).sum()),
        n_contexts=len(text),
        left_out_ids=tuple(left_out),
        sae_lens_version=importlib.metadata.version("sae-lens"),
    )


def _check(models: ModelPair, crosscoder: Crosscoder, text: TokenizedText) -> None:
    if any(site.minus for site in crosscoder.sites):
        raise ValueError(
            "a diff-SAE has no site of one model: it reconstructs the difference of two "
            "activations and neither of them. Evaluate it with score_edits, or a crosscoder here."
        )
    if not len(text) or int(text.lengths.min()) < text.context_size:
        raise ValueError(
            f"{len(text)} contexts of {text.context_size} tokens, some padded: SAELens would count "
            "the padding. Give packed text of one context or more."
        )
    check_source(models, crosscoder)


class _Contexts:
    """The store that `run_evals` reads from: each batch of given contexts once, in order."""

    def __init__(self, text: TokenizedText, device: torch.device, batch_size: int):
        self.batches = [part.to(device).long() for part in text.tokens.split(batch_size)]
        self.context_size = text.context_size
        self.store_batch_size_prompts = batch_size
        self.reset_input_dataset()

    def reset_input_dataset(self) -> None:
        self._rest = iter(self.batches)

    def get_batch_tokens(self, batch_size: int) -> Int[Tensor, "batch pos"]:
        assert batch_size == self.store_batch_size_prompts
        return next(self._rest)


class SAEBridge(SAETransformerBridge):
    """A `SAETransformerBridge` whose hook points can be found again after an SAE was there."""

    def _reset_sae(self, act_name: str, prev_wrapper: Any = None) -> None:
        name = self._resolve_hook_name(act_name)
        name = self._transcoder_output_hooks.get(act_name, name)
        super()._reset_sae(act_name, prev_wrapper)
        # sae-lens 6.54 on transformer-lens 3.9 leaves the new hook point without the first part of
        # its name, and then run_with_hooks and hooks() pass over it without a word.
        hook_point = self._hook_registry.get(name)
        if isinstance(hook_point, HookPoint):
            hook_point.name = name


def sae_bridge(model: HookedModel) -> SAEBridge:
    """A loaded bridge to which SAELens attaches SAEs, without a second copy of its weights.

        model = sae_bridge(pair.model("finetuned"))
        model.run_with_cache_with_saes(tokens, saes=[sae])

    Weights and hook points are shared, so while an SAE is attached, the given bridge has it too. It
    keeps all its hook names; a `SAETransformerBridge` knows canonical ones alone, and not the
    `hook_resid_post` of most dictionaries.

    Raises ValueError for a model that is not a bridge.
    """
    if not hasattr(model, "_hook_registry"):
        raise ValueError(
            f"{type(model).__name__} is not a TransformerBridge. Load a HookedTransformer as "
            "sae_lens.HookedSAETransformer: it keeps its hook names."
        )
    # Not copy.copy, by which the config would be bound to the copy.
    made = object.__new__(SAEBridge)
    made.__dict__.update(vars(model), _acts_to_saes={}, _transcoder_output_hooks={})
    return made
