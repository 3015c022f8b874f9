"""A base model and a fine-tuned one, each with one hook point: the subject of every comparison.

Contract: text is tokenised once and the same ids go to both models; `pair.activations(tokens)` is
[batch, pos, n_sites, d_model] with the base at site 0; after every call the models are as before.
Limit: decoder-only models and right padding, which causal attention never sees: no mask is needed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder import hooked_model, loading, pair_checks, tokenization
from tl_crosscoder.hooked_model import Hook, HookedModel
from tl_crosscoder.site import Site

if TYPE_CHECKING:
    from tl_crosscoder.pair_view import PairView

Patch = Callable[[Float[Tensor, "batch pos d_model"]], Tensor] | Float[Tensor, "batch pos d_model"]
"""What to put in an activation's place, or a function from the old one to the new one."""
Prompts = str | Sequence[str | list[int]] | Int[Tensor, "batch pos"]
"""One text, several texts or lists of ids, or unpadded tokens."""


class ModelPair:
    """Two models that differ in their weights only, and the hook point where they are compared.

    Takes loaded models of either TransformerLens kind, even one of each; `from_pretrained` loads
    them. Puts both in eval mode. Raises ValueError where they cannot be compared: another
    tokenizer, width, dtype, weight processing, or a hook that does not exist.
    """

    def __init__(
        self,
        base: HookedModel,
        finetuned: HookedModel,
        *,
        hook_name: str | tuple[str, str],
        tokenizer: Any = None,
        site_names: tuple[str, str] = ("base", "finetuned"),
        model_names: tuple[str, str] | None = None,
        revisions: tuple[str | None, str | None] = (None, None),
        adapter: str | None = None,
    ):
        self.models: tuple[HookedModel, HookedModel] = (base, finetuned)
        hook_names = (hook_name, hook_name) if isinstance(hook_name, str) else hook_name
        model_names = model_names or (_model_name(base), _model_name(finetuned))
        labels = [f"{s} model {m!r}" for s, m in zip(site_names, model_names, strict=True)]
        for model, name, label in zip(self.models, hook_names, labels, strict=True):
            hooked_model.check_hook(model, name, label)
        self.tokenizer = pair_checks.common_tokenizer(self.models, tokenizer, labels)
        self.weight_processing: str = pair_checks.check_same_kind(self.models, labels)
        """`raw` or `processed` (norms folded, weights centred): record it with a dictionary."""
        for model in self.models:
            model.eval()
        widths = pair_checks.check_widths(self.models, hook_names, labels)
        self.sites: tuple[Site, ...] = tuple(
            Site(
                name=site_names[i],
                d_model=widths[i],
                hook_name=hook_names[i],
                model_name=model_names[i],
                revision=revisions[i],
                adapter=adapter if i == 1 else None,
            )
            for i in range(2)
        )

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        finetuned: str | Path | None = None,
        *,
        hook_name: str | tuple[str, str],
        adapter: str | Path | None = None,
        tokenizer: Any = None,
        device: str = "cpu",
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        finetuned_revision: str | None = None,
    ) -> "ModelPair":
        """Load both models from hub names or local folders, weights raw.

        Give exactly one of `finetuned` and `adapter` (PEFT, merged into a second copy of the base).
        Raises FileNotFoundError or ValueError where something cannot be found or does not fit.
        """
        if (finetuned is None) == (adapter is None):
            raise ValueError(
                f"give exactly one of finetuned ({finetuned!r}) and adapter ({adapter!r}): the "
                "fine-tuned model, or the PEFT adapter that makes it from the base."
            )
        how = {"device": device, "dtype": loading.torch_dtype(dtype), "tokenizer": tokenizer}
        first = loading.load(base, revision=revision, **how)
        if adapter is not None:
            second = loading.load_adapted(
                base, adapter, revision=revision, adapter_revision=finetuned_revision, **how
            )
        else:
            assert finetuned is not None
            second = loading.load(finetuned, revision=finetuned_revision, **how)
        return cls(
            first,
            second,
            hook_name=hook_name,
            tokenizer=tokenizer,
            model_names=(str(base), str(finetuned or base)),
            revisions=(revision, finetuned_revision),
            adapter=None if adapter is None else str(adapter),
        )

    # --- what it is ------------------------------------------------------------------------------

    @property
    def n_sites(self) -> int:
        """Number of sites."""
        return len(self.sites)

    @property
    def d_model(self) -> int:
        """Width of each site's activation."""
        return self.sites[0].d_model

    @property
    def d_vocab(self) -> int:
        """Width of the logits, and the bound of token ids."""
        return self.models[0].cfg.d_vocab

    @property
    def n_ctx(self) -> int:
        """Longest text both models take, in tokens."""
        return min(model.cfg.n_ctx for model in self.models)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Where each model lives."""
        return tuple(hooked_model.device_of(model) for model in self.models)

    @property
    def device(self) -> torch.device:
        """Where tokens and activations live: with the first model."""
        return self.devices[0]

    @property
    def stop_at_layer(self) -> int | None:
        """The first layer that neither model needs; None where a hook is outside the blocks."""
        stops = [site.stop_at_layer for site in self.sites]
        known = [stop for stop in stops if stop is not None]
        return max(known) if len(known) == len(stops) else None

    def site_index(self, site: str) -> int:
        """Position of a site by name. Raises ValueError for an unknown one."""
        names = [known.name for known in self.sites]
        if site not in names:
            raise ValueError(f"site {site!r} is not in this pair; it has {names}.")
        return names.index(site)

    def model(self, site: str) -> HookedModel:
        """The model of a site."""
        return self.models[self.site_index(site)]

    def __repr__(self) -> str:
        sites = ", ".join(f"{s.name}={s.adapter or s.model_name!r}" for s in self.sites)
        hooks = " | ".join(dict.fromkeys(site.hook_name for site in self.sites))
        return (
            f"ModelPair({sites}, hook_name={hooks!r}, d_model={self.d_model}, "
            f"weights={self.weight_processing!r}, device='{self.device}')"
        )

    # --- text to activations ---------------------------------------------------------------------

    def encode(self, text: str, *, prepend_bos: bool = True) -> list[int]:
        """Ids of one text of any length, with at most one BOS."""
        return tokenization.encode(self.tokenizer, text, prepend_bos=prepend_bos)

    def to_tokens(
        self, text: str | Sequence[str], *, prepend_bos: bool = True, max_tokens: int | None = None
    ) -> Int[Tensor, "batch pos"]:
        """Right-padded ids for both models.

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
        width = max(map(len, rows), default=0)
        filler = tokenization.pad_id(self.tokenizer)
        padded = [row + [filler] * (width - len(row)) for row in rows]
        n_tokens = torch.tensor([len(row) for row in rows], device=self.device)
        tokens = torch.tensor(padded, dtype=torch.long, device=self.device)
        mask = torch.arange(width, device=self.device) < n_tokens[:, None]
        return tokens.reshape(mask.shape), mask

    @torch.no_grad()
    def activations(
        self, tokens: Int[Tensor, "batch pos"], *, dtype: torch.dtype = torch.float32
    ) -> Float[Tensor, "batch pos n_sites d_model"]:
        """Activations of both models at their hooks, for the same tokens.

        On the first model's device, unscaled (`Site.scale` is not applied). Layers after the hooks
        do not run. Right-padded rows need no mask; drop what stands at their padding. Raises
        ValueError for ids outside the vocabulary and for more than `n_ctx` positions.
        """
        tokens = self._checked(tokens)
        sides = [
            hooked_model.run_to_hook(model, site.hook_name, tokens).to(self.device, dtype)
            for model, site in zip(self.models, self.sites, strict=True)
        ]
        return torch.stack(sides, dim=2)

    def _checked(self, tokens: Int[Tensor, "batch pos"]) -> Int[Tensor, "batch pos"]:
        hooked_model.check_tokens(tokens, d_vocab=self.d_vocab, n_ctx=self.n_ctx)
        return tokens

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

    def as_hooked_model(self) -> "PairView":
        """The pair as one TransformerLens model, whose hook `hook_sites` carries all sites.

        For SAELens: `LanguageModelSAETrainingRunner(cfg, override_model=pair.as_hooked_model())`
        with `hook_name="hook_sites"` and `d_in = n_sites * d_model`.
        """
        from tl_crosscoder.pair_view import PairView

        return PairView(self)


def _model_name(model: HookedModel) -> str:
    return str(getattr(model.cfg, "model_name", None) or "custom")
