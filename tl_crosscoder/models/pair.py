"""`ModelPair`: TransformerLens models at hook points, two of which are compared.

    ModelPair.from_pretrained("base", "tuned", hook_name="blocks.9.hook_resid_post")
    ModelPair.from_pretrained("base", ["sft", "rl"], hook_name="blocks.9.hook_resid_post")
    ModelPair.from_pretrained("base", hook_name=["blocks.3.hook_out", "blocks.9.hook_out"])

Contract: text is tokenised once and the same ids go to all models; each model runs once a batch,
however many of its hook points are sites; `activations(tokens)` is [batch, pos, n_sites, d_model],
base first, or [batch, pos, d_in] where widths differ and for a single site; after every call the
models are as before. Limit: decoder-only models in memory that share a tokenizer, and right
padding, which causal attention never sees: no mask is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.config.inputs import ModelsConfig
from tl_crosscoder.models import checks, hooked, loading, tokenizer
from tl_crosscoder.models.devices import moved_together
from tl_crosscoder.models.hooked import Hook, HookedModel
from tl_crosscoder.models.site import (
    Names,
    Site,
    pair_sites,
    planned_sites,
    site_columns,
    site_index,
    sites_of,
)
from tl_crosscoder.models.source import ActivationSource, Contexts
from tl_crosscoder.results.render import Section, as_html

Patch = Callable[[Float[Tensor, "batch pos d_model"]], Tensor] | Float[Tensor, "batch pos d_model"]
"""Activation to put in the place of the model's own, or a function from the old to the new one."""
Prompts = str | Sequence[str | list[int]] | Int[Tensor, "batch pos"]
"""One text, several texts or lists of ids, or unpadded tokens."""


class ModelPair(ActivationSource):
    """Two or more models at hook points; the first site is the base, two sites are compared.

    Args:
        models: loaded models of either TransformerLens kind, base first: one for each of `sites`
            (the same object for several hook points of one model), or, with `hook_name`, each
            model once.
        hook_name: hook point that is read in every model, or several.
        sites: what is recorded of each model and hook point, in place of `hook_name`.
        model_names: with `hook_name`, what a dictionary records of each model; by default the name
            in its config.
        tokenizer: for all models; by default the last model's, which has the chat template.
        compared: names of the base and the fine-tuned site; by default the first site and the last
            other one with its hook name.

    Raises:
        ValueError: models that cannot be compared: another tokenizer, dtype, device or weight
            processing, a hook that does not exist, or names that do not fit.
    """

    def __init__(
        self,
        *models: HookedModel,
        hook_name: str | Sequence[str] | None = None,
        sites: Sequence[Site] | None = None,
        model_names: Sequence[str] | None = None,
        tokenizer: Any = None,
        compared: tuple[str, str] | None = None,
    ) -> None:
        if (hook_name is None) == (sites is None):
            raise ValueError("give either hook_name, read in every model, or sites, one a model.")
        if sites is None:
            assert hook_name is not None
            own = [str(getattr(m.cfg, "model_name", None) or "custom") for m in models]
            names = model_names or own
            sites = planned_sites(names, hook_name)
            models = tuple(m for m in models for _ in range(len(sites) // max(1, len(models))))
        names = [site.name for site in sites]
        if not names or len(set(names)) < len(names) or len(names) != len(models):
            raise ValueError(
                f"the sites are named {names}, for {len(models)} models: give one site or more, "
                "with names that differ, and one model for each."
            )
        self.models: tuple[HookedModel, ...] = models
        """Model of each site."""
        labels = [f"{site.name} model {site.model_name!r}" for site in sites]
        located = list(zip(models, sites, labels, strict=True))
        for model, site, label in located:
            hooked.check_hook(model, site.hook_name, label)
        distinct = {id(model): (model, label) for model, _, label in located}
        each, own_labels = zip(*distinct.values(), strict=True)
        self._tokenizer, self._added = checks.common_tokenizer(each, tokenizer, own_labels)
        self.tokenizer_name = getattr(tokenizer, "name_or_path", None) or None
        self.weight_processing = checks.check_same_kind(each, own_labels)
        for model in each:
            model.eval()
        hooks_of: dict[HookedModel, dict[str, str]] = {}
        for model, site, label in located:
            hooks_of.setdefault(model, {})[site.hook_name] = label
        widths = {model: hooked.hook_widths(model, own) for model, own in hooks_of.items()}
        self.model_sites = tuple(
            _measured(site, label, width=widths[model][site.hook_name])
            for model, site, label in located
        )
        self._compare(compared)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        finetuned: Names | None = None,
        *,
        hook_name: str | Sequence[str],
        adapter: Names | None = None,
        tokenizer: Any = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        merge_adapter: bool | None = None,
        revision: str | None = None,
        finetuned_revision: str | Sequence[str | None] | None = None,
    ) -> "ModelPair":
        """Load models from hub names or local folders, weights raw, and read each at the hooks.

        Args:
            base: the base model.
            finetuned: the fine-tuned model, or several such as SFT and RL; or give `adapter`. The
                base alone is enough for several hook points.
            hook_name: hook point that is read in every model, or several.
            adapter: PEFT adapter on another copy of the base, or several.
            tokenizer: for all models, instead of their own, or its name or folder. Where a model
                has none, that of an adapter or of another model is taken, with a warning.
            device: one for all models, or one for each model with commas ("cuda:0,cuda:1");
                activations live on the first.
            dtype: of the models; "nf4" is 4-bit weights (bitsandbytes), computed in bfloat16.
            merge_adapter: merge the adapter into the weights or attach it; None merges unless the
                weights are quantised. Activations are the same up to float error.
            revision: of the base.
            finetuned_revision: of the fine-tuned model or adapter; of several, one for each.

        Raises:
            ValueError, FileNotFoundError: names that do not go together, that cannot be found or
                whose models do not fit.
        """
        sites = pair_sites(
            base,
            finetuned,
            hook_name=hook_name,
            adapter=adapter,
            revision=revision,
            finetuned_revision=finetuned_revision,
        )
        how = {"device": device, "dtype": dtype, "merge_adapter": merge_adapter}
        return cls.from_sites(sites, tokenizer=tokenizer, **how)

    @classmethod
    def from_sites(
        cls,
        sites: Sequence[Site],
        *,
        tokenizer: Any = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        merge_adapter: bool | None = None,
    ) -> "ModelPair":
        """Load the models that these sites name, each once: those of a saved dictionary, or new.

        The site of a difference gives the `difference()` of its two models. For the options see
        `from_pretrained`; `device` names devices in the order of the models' first sites. Raises
        FileNotFoundError or ValueError where something cannot be found or does not fit, or where a
        site has another width than it was recorded with.
        """
        minus = sites[0].minus if sites else None
        if minus is not None:
            # The site of x^1 was recorded under the name of the difference.
            name = "finetuned" if minus.name == "base" else "minuend"
            sites = [minus, replace(sites[0], name=name, minus=None)]
        sites = _with_base_revisions(sites)
        tokenizer, tokenizer_name = loading.tokenizer_of_all(sites, tokenizer)
        of_model: dict[tuple[str | None, ...], Site] = {}
        for site in sites:
            of_model.setdefault(_model_key(site), site)
        options = loading.options_of_each(
            [site.adapter for site in of_model.values()],
            device=device,
            dtype=dtype,
            merge_adapter=merge_adapter,
            tokenizer=tokenizer,
        )
        loaded = {
            key: loading.load_site(site, how)
            for (key, site), how in zip(of_model.items(), options, strict=True)
        }
        models = [loaded[_model_key(site)] for site in sites]
        pair = cls(*models, sites=sites, tokenizer=tokenizer)
        pair.tokenizer_name = tokenizer_name
        return pair if minus is None else pair.difference()

    @classmethod
    def from_config(cls, config: ModelsConfig) -> "ModelPair":
        """The models that a config names, at their sites, or the difference of the two.

        Raises ValueError or FileNotFoundError as `sites_of` and `from_sites` do.
        """
        how = {"device": config.device, "dtype": config.dtype, "tokenizer": config.tokenizer}
        models = cls.from_sites(sites_of(config), merge_adapter=config.merge_adapter, **how)
        return models.difference() if config.difference else models

    # --- what it is ------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Any:
        """Hugging Face tokenizer of all models."""
        return self._tokenizer

    @property
    def d_vocab(self) -> int:
        """Bound of token ids: the smallest width of the models' logits."""
        return min(model.cfg.d_vocab for model in self.models)

    @property
    def n_ctx(self) -> int:
        """Longest text that all models take, in tokens."""
        return min(model.cfg.n_ctx for model in self.models)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Device of each site's model."""
        return tuple(hooked.device_of(model) for model in self.models)

    @property
    def device(self) -> torch.device:
        """Device of tokens and activations: the first model's."""
        return self.devices[0]

    @property
    def computed_in(self) -> str:
        """Number format that the models compute in, the same for all."""
        return checks.dtype_name(self.models[0])

    def site_index(self, site: str) -> int:
        """Position of a model site by name. Raises ValueError for an unknown one."""
        return site_index(self.model_sites, site)

    def model(self, site: str) -> HookedModel:
        """Model of a site, by the site's name."""
        return self.models[self.site_index(site)]

    def at(self, hook_name: str | Sequence[str]) -> "ModelPair":
        """The same models, compared as here, at another hook point or at several.

        Raises ValueError for hooks that they do not have, and where two hook points of one model
        are compared here.
        """
        hooks = [hook_name] if isinstance(hook_name, str) else [*hook_name]
        own: dict[str, tuple[HookedModel, Site]] = {}
        for model, site in zip(self.models, self.model_sites, strict=True):
            own.setdefault(site.owner, (model, site))

        def moved(site: Site, hook: str) -> Site:
            name = site.owner if len(hooks) == 1 else f"{site.owner}@{hook}"
            return replace(site, name=name, hook_name=hook, d_model=0)

        compared = [moved(self.model_sites[i], hooks[0]).name for i in self.compared or ()]
        pair = ModelPair(
            *(model for model, _ in own.values() for _ in hooks),
            sites=[moved(site, hook) for _, site in own.values() for hook in hooks],
            tokenizer=self.tokenizer,
            compared=(compared[0], compared[1]) if compared else None,
        )
        pair.tokenizer_name, pair._added = self.tokenizer_name, self._added
        pair.is_difference = self.is_difference
        return pair

    def __repr__(self) -> str:
        sites = ", ".join(f"{s.name}={s.label!r}" for s in self.model_sites)
        hooks = " | ".join(dict.fromkeys(site.hook_name for site in self.model_sites))
        widths = " | ".join(dict.fromkeys(str(site.d_model) for site in self.model_sites))
        difference = ", is_difference=True" if self.is_difference else ""
        return (
            f"ModelPair({sites}, hook_name={hooks!r}, d_model={widths}, "
            f"weights={self.weight_processing!r}, device='{self.device}'{difference})"
        )

    def _repr_html_(self) -> str:
        title = (
            f"ModelPair: {self.weight_processing} weights, {self.d_vocab:,} tokens, "
            f"context {self.n_ctx:,}"
        )
        columns = site_columns(self.sites)
        if not self.is_difference:
            columns["device"] = [str(d) for d in self.devices]
        return as_html([Section(title=title, columns=columns)])

    # --- text to activations ---------------------------------------------------------------------

    def encode(self, text: str, *, prepend_bos: bool = True) -> list[int]:
        """Ids of one text of any length, with at most one BOS."""
        return tokenizer.encode(self.tokenizer, text, prepend_bos=prepend_bos)

    def to_tokens(
        self, text: str | Sequence[str], *, prepend_bos: bool = True, max_tokens: int | None = None
    ) -> Int[Tensor, "batch pos"]:
        """Right-padded ids for all models.

        `prepend_bos` gives every text one BOS, unless it starts with one (chat templates) or the
        tokenizer has none. `max_tokens` cuts each text. Raises ValueError for texts longer than
        `n_ctx`, and for no text at all.
        """
        return self.to_tokens_and_mask(text, prepend_bos=prepend_bos, max_tokens=max_tokens)[0]

    def to_tokens_and_mask(
        self, text: str | Sequence[str], *, prepend_bos: bool = True, max_tokens: int | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """`to_tokens`, and which positions hold real tokens."""
        texts = [text] if isinstance(text, str) else text
        ids = [self.encode(each, prepend_bos=prepend_bos)[:max_tokens] for each in texts]
        tokens, mask = self.pad(ids)
        return self._checked(tokens), mask

    def pad(
        self, rows: Sequence[list[int]]
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Ids of several texts as one right-padded tensor, and which positions hold real tokens."""
        filler = tokenizer.pad_id(self.tokenizer)
        return tokenizer.pad(rows, filler=filler, device=self.device)

    def activations(
        self, tokens: Int[Tensor, "batch pos"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch pos *row"]:
        """Activations of all sites for the same tokens, shaped as the module says.

        On the first model's device, unscaled (`Site.scale` is not applied). Layers after the hooks
        do not run. Right-padded rows need no mask; drop what stands at their padding. Raises
        ValueError for ids outside the vocabulary and for more than `n_ctx` positions.
        """
        return self.joined(self.site_activations(tokens, self.read_sites, dtype=dtype))

    def site_rows(
        self, contexts: Contexts, sites: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Float[Tensor, "tokens d_model"]]:
        """Activations of some model sites, by position, at the kept tokens."""
        kept = contexts.mask.flatten().nonzero().squeeze(1).to(self.device)
        found = self.site_activations(contexts.tokens, sites, dtype=dtype)
        return [part.flatten(0, 1).index_select(0, kept) for part in found]

    @torch.no_grad()
    def site_activations(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> list[Float[Tensor, "batch pos d_model"]]:
        """Activations of some model sites, by position; only their models run, each once."""
        tokens = self._checked(tokens)
        own_sites: dict[HookedModel, list[int]] = {}
        for i in sites:
            own_sites.setdefault(self.models[i], []).append(i)
        parts: dict[int, Tensor] = {}
        for model, own in own_sites.items():
            hook_names = [self.model_sites[i].hook_name for i in own]
            found = hooked.run_to_hooks(model, hook_names, tokens)
            parts |= zip(own, moved_together(found, self.device, dtype), strict=True)
        return [parts[i] for i in sites]

    def _checked(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        hooked.check_tokens(tokens, d_vocab=self.d_vocab, n_ctx=self.n_ctx)
        checks.check_shared(tokens, self._added)
        return tokens.long()

    # --- interventions ---------------------------------------------------------------------------

    @contextmanager
    def patched(self, site: str, patch: Patch) -> Iterator[HookedModel]:
        """Replace the activation at the hook of a site while the context is open.

        Gradients flow; `run_with_patch` is the shorter form without them.
        """
        hook_name = self.model_sites[self.site_index(site)].hook_name
        new = patch if not isinstance(patch, Tensor) else lambda _: patch
        with self.model(site).hooks(fwd_hooks=[hooked.replacing_hook(hook_name, new)]) as model:
            yield model

    @torch.no_grad()
    def logits(
        self, tokens: Int[Tensor, "batch pos"], *, site: str = "finetuned"
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits of one model, on its device and in its dtype."""
        model = self.model(site)
        tokens = self._checked(tokens).to(hooked.device_of(model))
        # Some models pad their vocabulary: logits of all models stand side by side.
        return model(tokens, return_type="logits", padding_side="right")[..., : self.d_vocab]

    def run_with_patch(
        self, tokens: Int[Tensor, "batch pos"], patch: Patch, *, site: str = "finetuned"
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of one model that continues from a patched activation at its hook."""
        with self.patched(site, patch):
            return self.logits(tokens, site=site)

    def generate_tokens(
        self,
        prompts: Prompts,
        *,
        site: str = "finetuned",
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        fwd_hooks: Sequence[Hook] = (),
        stop_token_ids: Sequence[int] | None = None,
        prepend_bos: bool = True,
        use_past_kv_cache: bool = True,
        with_stop: bool = False,
    ) -> list[tuple[list[int], list[int]]]:
        """Continue prompts with one model, with hooks active: (prompt ids, new ids) for each.

        `temperature` 0 is greedy, else sampling is seeded by `seed` (with the batch: the same
        prompt in another batch may be continued differently). Stops before any of
        `stop_token_ids`, or after it `with_stop`; None is what the tokenizer or either config calls
        the end of a text or turn, and () never stops. With the key-value cache a hook sees the
        prompt, then one new token at a time; without it the whole text so far at each step.
        Raises ValueError for unknown hooks and past `n_ctx`.
        """
        model = self.model(site)
        for name, _ in fwd_hooks:
            if isinstance(name, str):
                hooked.check_hook(model, name, f"{site} model")
        rows = self._prompt_ids(prompts, prepend_bos=prepend_bos)
        for row in rows:
            self._checked(torch.tensor([row]))
        longest = max(map(len, rows), default=0)
        if max_new_tokens < 1 or longest + max_new_tokens > self.n_ctx:
            raise ValueError(
                f"max_new_tokens={max_new_tokens} after a prompt of {longest} tokens: it must be "
                f"at least 1 and end within the models' context of {self.n_ctx}."
            )
        if stop_token_ids is None:
            stop_token_ids = hooked.stop_ids_of(self.models, self.tokenizer)
        new = hooked.generate_ids(
            model,
            rows,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_ids=stop_token_ids,
            fwd_hooks=fwd_hooks,
            use_past_kv_cache=use_past_kv_cache,
            with_stop=with_stop,
        )
        return list(zip(rows, new, strict=True))

    def generate(self, prompts: Prompts, **options: Any) -> str | list[str]:
        """Text of the continuations, without the prompts: one string for one text, else a list.

        Options are those of `generate_tokens`.
        """
        pairs = self.generate_tokens(prompts, **options)
        texts = [tokenizer.decode_continuation(self.tokenizer, *pair) for pair in pairs]
        return texts[0] if isinstance(prompts, str) else texts

    def _prompt_ids(self, prompts: Prompts, *, prepend_bos: bool) -> list[list[int]]:
        if isinstance(prompts, Tensor):
            return self._checked(prompts).tolist()
        each = [prompts] if isinstance(prompts, str) else prompts
        return [self.encode(p, prepend_bos=prepend_bos) if isinstance(p, str) else p for p in each]


def _measured(site: Site, label: str, *, width: int) -> Site:
    """The site with its width; ValueError if it was recorded with another one."""
    assert site.minus is None, "from_sites resolves differences"
    if site.d_model not in (0, width):
        raise ValueError(
            f"hook {site.hook_name!r} of the {label} is {width} wide, but the site was recorded "
            f"with d_model={site.d_model}. Load the model that it was recorded with."
        )
    return replace(site, d_model=width, scale=1.0)


def _model_key(site: Site) -> tuple[str | None, ...]:
    return site.model_name, site.revision, site.adapter, site.base_revision


def _with_base_revisions(sites: Sequence[Site]) -> list[Site]:
    """Older files record the revision of an adapter's base with the base's own site only."""
    known = {s.model_name: s.revision for s in reversed(sites) if s.adapter is None}
    return [
        replace(s, base_revision=s.base_revision or known.get(s.model_name)) if s.adapter else s
        for s in sites
    ]
