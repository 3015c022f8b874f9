"""Models at hook points: what a pair and any list of sites have in common.

Contract: text is tokenised once and the same ids go to all models; each model runs once a batch,
however many of its hook points are sites; after every call the models are as before.
Limit: decoder-only models and right padding, which causal attention never sees: no mask is needed.

Any list of (model, hook point): base, SFT and RL, several layers, models of unequal width.

    ModelSites.from_pretrained(["base", "sft", "rl"], hook_names="blocks.9.hook_resid_post")
    ModelSites.from_pretrained(["base"], hook_names=["blocks.3.hook_out", "blocks.9.hook_out"])

Contract: `activations(tokens)` is [batch, pos, n_sites, d_model] for several sites of one width and
else [batch, pos, d_in]; each model runs once a batch. Site 0 is the base. Limit: one tokenizer, and
all models in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.models import checks as pair_checks
from tl_crosscoder.models import hooked as hooked_model
from tl_crosscoder.models import loading
from tl_crosscoder.models import tokenizer as tokenization
from tl_crosscoder.models.devices import moved_together
from tl_crosscoder.models.hooked import Hook, HookedModel
from tl_crosscoder.models.site import Site, row_shape, site_columns, site_index
from tl_crosscoder.models.source import Contexts
from tl_crosscoder.results.render import Section, as_html

if TYPE_CHECKING:
    from tl_crosscoder.models.difference import SiteDifference
    from tl_crosscoder.models.saelens import PairView

Patch = Callable[[Float[Tensor, "batch pos d_model"]], Tensor] | Float[Tensor, "batch pos d_model"]
"""What to put in an activation's place, or a function from the old one to the new one."""
Prompts = str | Sequence[str | list[int]] | Int[Tensor, "batch pos"]
"""One text, several texts or lists of ids, or unpadded tokens."""


class ComparedModels:
    """Abstract: what `ModelPair` and `ModelSites` do once they have their models.

    Takes one model a site (the same object for several hook points of one model), and the sites;
    their widths are measured. Puts all models in eval mode. Raises ValueError where they cannot be
    compared: another tokenizer, dtype or weight processing, or a hook that does not exist.
    """

    def __init__(
        self, models: Sequence[HookedModel], sites: Sequence[Site], *, tokenizer: Any = None
    ):
        self.models: tuple[HookedModel, ...] = tuple(models)
        """One for each site."""
        names = [site.name for site in sites]
        if not names or len(set(names)) < len(names) or len(names) != len(self.models):
            raise ValueError(
                f"the sites are named {names}, for {len(self.models)} models: give one site or "
                "more, with names that differ, and one model for each."
            )
        labels = [f"{site.name} model {site.model_name!r}" for site in sites]
        sides = list(zip(self.models, sites, labels, strict=True))
        for model, site, label in sides:
            hooked_model.check_hook(model, site.hook_name, label)
        distinct = {id(model): (model, label) for model, _, label in sides}
        each, own_labels = zip(*distinct.values(), strict=True)
        self.tokenizer = pair_checks.common_tokenizer(each, tokenizer, own_labels)
        self.weight_processing: str = pair_checks.check_same_kind(each, own_labels)
        """`raw` or `processed` (norms folded, weights centred): record it with a dictionary."""
        for model in each:
            model.eval()
        self.sites: tuple[Site, ...] = tuple(_measured(*side) for side in sides)

    # --- what it is ------------------------------------------------------------------------------

    @property
    def n_sites(self) -> int:
        """Number of sites."""
        return len(self.sites)

    @property
    def d_model(self) -> int:
        """Width of the widest site."""
        return max(site.d_model for site in self.sites)

    @property
    def d_in(self) -> int:
        """Width of all sites together."""
        return sum(site.d_model for site in self.sites)

    @property
    def d_vocab(self) -> int:
        """The bound of token ids: the smallest width of the models' logits."""
        return min(model.cfg.d_vocab for model in self.models)

    @property
    def n_ctx(self) -> int:
        """Longest text all models take, in tokens."""
        return min(model.cfg.n_ctx for model in self.models)

    @property
    def cache_id(self) -> None:
        """None: models run, nothing is cached."""
        return

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where the model of each site lives."""
        return tuple(hooked_model.device_of(model) for model in self.models)

    @property
    def device(self) -> torch.device:
        """Where tokens and activations live: with the first model."""
        return self.devices[0]

    @property
    def stop_at_layer(self) -> int | None:
        """The first layer that no model needs; None where a hook is outside the blocks."""
        return hooked_model.last_stop_layer([site.hook_name for site in self.sites])

    def site_index(self, site: str) -> int:
        """Position of a site by name. Raises ValueError for an unknown one."""
        return site_index(self.sites, site)

    def model(self, site: str) -> HookedModel:
        """The model of a site."""
        return self.models[self.site_index(site)]

    def __repr__(self) -> str:
        sites = ", ".join(f"{s.name}={s.label!r}" for s in self.sites)
        hooks = " | ".join(dict.fromkeys(site.hook_name for site in self.sites))
        widths = " | ".join(dict.fromkeys(str(site.d_model) for site in self.sites))
        return (
            f"{type(self).__name__}({sites}, hook_name={hooks!r}, d_model={widths}, "
            f"weights={self.weight_processing!r}, device='{self.device}')"
        )

    def _repr_html_(self) -> str:
        title = (
            f"{type(self).__name__}: {self.weight_processing} weights, {self.d_vocab:,} tokens, "
            f"context {self.n_ctx:,}"
        )
        columns = site_columns(self.sites) | {"device": [str(d) for d in self.devices]}
        return as_html([Section(title=title, columns=columns)])

    # --- text to activations ---------------------------------------------------------------------

    def encode(self, text: str, *, prepend_bos: bool = True) -> list[int]:
        """Ids of one text of any length, with at most one BOS."""
        return tokenization.encode(self.tokenizer, text, prepend_bos=prepend_bos)

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
        tokens, mask = self.pad(
            [self.encode(each, prepend_bos=prepend_bos)[:max_tokens] for each in texts]
        )
        return self._checked(tokens), mask

    def pad(
        self, rows: Sequence[list[int]]
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Ids of several texts as one right-padded tensor, and which positions hold real tokens."""
        filler = tokenization.pad_id(self.tokenizer)
        return tokenization.pad(rows, filler=filler, device=self.device)

    @torch.no_grad()
    def activations(
        self, tokens: Int[Tensor, "batch pos"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch pos *row"]:
        """Activations of all sites for the same tokens.

        `[batch, pos, n_sites, d_model]` for several sites of one width; `[batch, pos, d_in]`, side
        by side, where widths differ and for a single site. On the first model's device, unscaled
        (`Site.scale` is not applied). Layers after the hooks do not run. Right-padded rows need no
        mask; drop what stands at their padding. Raises ValueError for ids outside the vocabulary
        and for more than `n_ctx` positions.
        """
        parts = self.site_activations(tokens, range(self.n_sites), dtype=dtype)
        if len(row_shape(self.sites)) == 2:
            return torch.stack(parts, dim=2)
        return torch.cat(parts, dim=2)

    def rows(
        self, contexts: Contexts, *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "tokens *row"]:
        """`activations` at the tokens that count, in the order of the mask."""
        parts = self.site_rows(contexts, range(self.n_sites), dtype=dtype)
        return torch.stack(parts, dim=1) if len(row_shape(self.sites)) == 2 else torch.cat(parts, 1)

    def site_rows(
        self, contexts: Contexts, sites: Sequence[int], *, dtype: torch.dtype = torch.float32
    ) -> list[Float[Tensor, "tokens d_model"]]:
        """The same of some of the sites, by position."""
        chosen = contexts.mask.flatten().nonzero().squeeze(1).to(self.device)
        found = self.site_activations(contexts.tokens, sites, dtype=dtype)
        return [part.flatten(0, 1).index_select(0, chosen) for part in found]

    @torch.no_grad()
    def site_activations(
        self,
        tokens: Int[Tensor, "batch pos"],
        sites: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
    ) -> list[Float[Tensor, "batch pos d_model"]]:
        """The same for some of the sites, by position; only their models run, each once."""
        tokens = self._checked(tokens)
        own_sites: dict[HookedModel, list[int]] = {}
        for i in sites:
            own_sites.setdefault(self.models[i], []).append(i)
        parts: dict[int, Tensor] = {}
        for model, own in own_sites.items():
            hook_names = [self.sites[i].hook_name for i in own]
            found = hooked_model.run_to_hooks(model, hook_names, tokens)
            parts |= zip(own, moved_together(found, self.device, dtype), strict=True)
        return [parts[i] for i in sites]

    def _checked(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        hooked_model.check_tokens(tokens, d_vocab=self.d_vocab, n_ctx=self.n_ctx)
        return tokens.long()

    # --- interventions ---------------------------------------------------------------------------

    @contextmanager
    def patched(self, site: str, patch: Patch) -> Iterator[HookedModel]:
        """The model of a site, with the activation at its hook replaced while the context is open.

        Gradients flow; `run_with_patch` is the shorter form without them.
        """
        hook_name = self.sites[self.site_index(site)].hook_name
        replace = patch if not isinstance(patch, Tensor) else lambda _: patch
        hook = hooked_model.replacing_hook(hook_name, replace)
        with self.model(site).hooks(fwd_hooks=[hook]) as model:
            yield model

    @torch.no_grad()
    def logits(
        self, tokens: Int[Tensor, "batch pos"], *, site: str = "finetuned"
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Next-token logits of one model, on its device and in its dtype."""
        model = self.model(site)
        tokens = self._checked(tokens).to(hooked_model.device_of(model))
        return model(tokens, return_type="logits", padding_side="right")

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
    ) -> list[tuple[list[int], list[int]]]:
        """Let one model write on, with hooks active: (prompt ids, new ids) for each prompt.

        `temperature` 0 is greedy, else sampling is seeded by `seed` (with the batch: the same
        prompt in another batch may go another way). Stops before any of `stop_token_ids`; None is
        what the tokenizer or either config calls the end of a text or turn, and () never stops.
        With the key-value cache a hook sees the prompt, then one new token at a time; without it
        the whole text so far at each step. Raises ValueError for unknown hooks and past `n_ctx`.
        """
        model = self.model(site)
        for name, _ in fwd_hooks:
            if isinstance(name, str):
                hooked_model.check_hook(model, name, f"{site} model")
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
            stop_token_ids = hooked_model.stop_ids_of(self.models, self.tokenizer)
        new = hooked_model.generate_ids(
            model,
            rows,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            stop_ids=stop_token_ids,
            fwd_hooks=fwd_hooks,
            use_past_kv_cache=use_past_kv_cache,
        )
        return list(zip(rows, new, strict=True))

    def generate(self, prompts: Prompts, **options: Any) -> str | list[str]:
        """Text of the continuations, without the prompts: one string for one text, else a list.

        Options are those of `generate_tokens`.
        """
        pairs = self.generate_tokens(prompts, **options)
        texts = [tokenization.decode_continuation(self.tokenizer, *pair) for pair in pairs]
        return texts[0] if isinstance(prompts, str) else texts

    def _prompt_ids(self, prompts: Prompts, *, prepend_bos: bool) -> list[list[int]]:
        if isinstance(prompts, Tensor):
            return self._checked(prompts).tolist()
        each = [prompts] if isinstance(prompts, str) else prompts
        return [self.encode(p, prepend_bos=prepend_bos) if isinstance(p, str) else p for p in each]

    # --- as something else -----------------------------------------------------------------------

    def difference(self, site: str | None = None, *, minus: str | None = None) -> "SiteDifference":
        """The source of x^1 - x^0 alone, the input of a diff-SAE; see `difference_of`."""
        from tl_crosscoder.models.difference import difference_of

        return difference_of(self, site, minus=minus)

    def as_hooked_model(self) -> "PairView":
        """All sites as one TransformerLens model, whose hook `hook_sites` carries them.

        For SAELens: `LanguageModelSAETrainingRunner(cfg, override_model=pair.as_hooked_model())`
        with `hook_name="hook_sites"` and `d_in = pair.d_in`.
        """
        from tl_crosscoder.models.saelens import PairView

        return PairView(self)


def _measured(model: HookedModel, site: Site, label: str) -> Site:
    """The site with its width; ValueError if it was recorded with another one."""
    assert site.minus is None, "a difference is a SiteDifference"
    width = hooked_model.hook_width(model, site.hook_name, label)
    if site.d_model not in (0, width):
        raise ValueError(
            f"hook {site.hook_name!r} of the {label} is {width} wide, but the site was recorded "
            f"with d_model={site.d_model}. Load the model that it was recorded with."
        )
    return replace(site, d_model=width, scale=1.0)


HookNames = str | Sequence[str] | Sequence[Sequence[str]]
"""A hook for every model, several for every model, or for each model its own list."""


class ModelSites(ComparedModels):
    """Models that share a tokenizer, and one or more hook points of each.

    `ModelSites(models, sites)` takes loaded models, one a site: the same object for several hook
    points of one model. Models may differ in width, depth and family, and in how far their
    vocabulary is padded. Raises ValueError for other tokenizers, and as `ComparedModels` does.
    """

    @classmethod
    def from_pretrained(
        cls,
        names: Sequence[str | Path],
        *,
        hook_names: HookNames,
        adapters: Sequence[str | Path | None] | None = None,
        revisions: Sequence[str | None] | None = None,
        tokenizer: Any = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        merge_adapter: bool | None = None,
    ) -> "ModelSites":
        """Load models by hub names or folders, weights raw, and read each at its hook points.

        `names` are one a model and start with the base; `adapters` (PEFT, each on a copy of the
        model named there) and `revisions` (of the adapter where there is one) go with them.
        For other combinations give sites to `from_sites`; the options of loading are the same.
        Raises FileNotFoundError or ValueError where something cannot be found or does not fit.
        """
        return cls.from_sites(
            planned_sites(names, hook_names, adapters=adapters, revisions=revisions),
            tokenizer=tokenizer,
            device=device,
            dtype=dtype,
            merge_adapter=merge_adapter,
        )

    @classmethod
    def from_sites(
        cls,
        sites: Sequence[Site],
        *,
        tokenizer: Any = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        merge_adapter: bool | None = None,
    ) -> "ModelSites":
        """Load the models that these sites name, each once: those of a saved dictionary, or new.

        `device` is one for all or, with commas, one for each model in the order of their first
        sites; activations live on the first. `dtype` "nf4" is 4-bit weights (bitsandbytes),
        computed in bfloat16. Adapters are merged into float weights and attached to quantised ones,
        unless `merge_adapter` says which. Raises FileNotFoundError or ValueError where something
        cannot be found or does not fit, or where a site has another width than it was recorded
        with.
        """
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
        return cls([loaded[_model_key(site)] for site in sites], sites, tokenizer=tokenizer)


def planned_sites(
    names: Sequence[str | Path],
    hook_names: HookNames,
    *,
    adapters: Sequence[str | Path | None] | None = None,
    revisions: Sequence[str | None] | None = None,
) -> tuple[Site, ...]:
    """Sites of these models, model by model, with widths yet to be measured.

    They are called base, finetuned, finetuned_2 and so on, and where a model has several,
    `base@blocks.3.hook_resid_post`.

    Raises:
        ValueError: lists that do not go together.
    """
    n = len(names)
    adapters, revisions = adapters or [None] * n, revisions or [None] * n
    per_model = _hooks_of_each_model(hook_names, n)
    lengths = {"names": n, "hook_names": len(per_model)}
    lengths |= {"adapters": len(adapters), "revisions": len(revisions)}
    if set(lengths.values()) != {n} or not n or not all(per_model):
        raise ValueError(
            f"one of each is needed for every model, and a hook point for each, but there are "
            f"{lengths} with the hook points {per_model}."
        )
    roles = ["base", "finetuned", *(f"finetuned_{i}" for i in range(2, n))][:n]
    base_revisions = {
        str(name): revision
        for name, adapter, revision in zip(names, adapters, revisions, strict=True)
        if adapter is None
    }
    return tuple(
        Site(
            name=role if len(own) == 1 else f"{role}@{hook}",
            hook_name=hook,
            model_name=str(name),
            revision=revision,
            adapter=None if adapter is None else str(adapter),
            base_revision=base_revisions.get(str(name)) if adapter is not None else None,
        )
        for role, name, own, adapter, revision in zip(
            roles, names, per_model, adapters, revisions, strict=True
        )
        for hook in own
    )


def _hooks_of_each_model(hook_names: HookNames, n_models: int) -> list[list[str]]:
    given = [hook_names] if isinstance(hook_names, str) else hook_names
    shared = [hook for hook in given if isinstance(hook, str)]
    return [shared] * n_models if shared else [list(own) for own in given]


def _model_key(site: Site) -> tuple[str | None, ...]:
    return site.model_name, site.revision, site.adapter, site.base_revision
