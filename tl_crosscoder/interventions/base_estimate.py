"""`BaseEstimate`: the base model's activation, guessed from the fine-tuned one.

    x^0 ~ x^1 A + c,   A = (C_11 + r I)^-1 C_10,   c = mean(x^0) - mean(x^1) A

ridge regression (Hoerl and Kennard 1970) with C the centred second moments of one pass in float64
and r a share of the mean variance of x^1. For deployments where only the fine-tuned model is at
hand. Contract: `[tokens, d_model]` in, the activations of all sites `[tokens, d_in]` out, the
fine-tuned ones as they are. Limit: affine, token by token. A high FVE of the activation says
little, as x^1 - x^0 is a small part of it: `quality` tells the FVE of the difference too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tl_crosscoder import files
from tl_crosscoder.data.harvest import harvest_rows
from tl_crosscoder.data.tokens import TokenizedText
from tl_crosscoder.models.site import Site, site_parts
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.results.tables import TableOfRows

WEIGHTS_NAME, FACTS_NAME = "base_estimate.safetensors", "base_estimate.json"


@dataclass(frozen=True, kw_only=True)
class EstimateQuality:
    """How good an estimate is on some text."""

    fve: dict[str, float]
    """Fraction of variance explained of each estimated site, by name."""
    difference_fve: float
    """1 - sum ||x^0 - estimate||^2 / sum ||(x^1 - x^0) - mean||^2: below 0 it says less of the
    difference than its mean does."""
    n_tokens: int


@dataclass(frozen=True, eq=False, kw_only=True)
class BaseEstimate:
    """An affine map from the fine-tuned site to all the others, which are one, the base, mostly."""

    weight: Float[Tensor, "d_model d_others"]
    """A, raw space."""
    bias: Float[Tensor, " d_others"]
    """c, raw space."""
    sites: tuple[Site, ...]
    """Sites of the source, in its order."""
    base: int
    """Position of the base site."""
    finetuned: int
    """Position of the site from which the others are estimated."""
    ridge: float
    n_tokens: int
    """Fitted on so many."""

    @classmethod
    def fit(
        cls,
        source: ActivationSource,
        text: TokenizedText,
        *,
        ridge: float = 1e-4,
        batch_size: int = 32,
    ) -> "BaseEstimate":
        """Fit on the tokens of a text that count, in one pass.

        Args:
            source: models, or a cache of them; a difference stands for its two sites.
            text: not the one that the quality is measured on.
            ridge: share of the mean variance of x^1 that is added to all its directions.
            batch_size: contexts a forward pass.

        Raises:
            ValueError: one site only, no ridge, or fewer than two tokens.
        """
        if not ridge > 0:
            raise ValueError(f"ridge is {ridge}; it must be above 0, such as 1e-4.")
        source = source.side_by_side()
        base, finetuned = source.check_one_width()
        order = [finetuned, *(i for i in range(source.n_sites) if i != finetuned)]
        d = source.sites[finetuned].d_model
        n, total, second = 0, torch.zeros(()), torch.zeros(())
        for parts in _parts(source, text, batch_size):
            x = torch.cat([parts[i] for i in order], dim=1)
            n, total = n + len(x), total + x.sum(dim=0)
            second = second + x[:, :d].T @ x
        if n < 2:
            raise ValueError(f"the text has {n} tokens that count; fit on many more than {d}.")
        mean = total / n
        C = second / n - mean[:d, None] * mean
        C_11, C_10 = C[:, :d], C[:, d:]
        r = ridge * C_11.trace() / d
        A = torch.linalg.solve(C_11 + r * torch.eye(d, dtype=C.dtype, device=C.device), C_10)
        return cls(
            weight=A.float(),
            bias=(mean[d:] - mean[:d] @ A).float(),
            sites=source.sites,
            base=base,
            finetuned=finetuned,
            ridge=ridge,
            n_tokens=n,
        )

    @property
    def others(self) -> tuple[int, ...]:
        """Positions of the estimated sites."""
        return tuple(i for i in range(len(self.sites)) if i != self.finetuned)

    def matrix(self) -> tuple[Float[Tensor, "d_model d_in"], Float[Tensor, " d_in"]]:
        """The map from x^1 to the activations of all sites side by side, and its constant."""
        d = self.weight.shape[0]
        own = torch.eye(d).to(self.weight), torch.zeros(d).to(self.bias)
        weights, biases = map(self._placed, (self.weight, self.bias), own)
        return torch.cat(weights, dim=-1), torch.cat(biases, dim=-1)

    def __call__(
        self, finetuned: Float[Tensor, "*rows d_model"]
    ) -> tuple[Float[Tensor, "*rows _"], ...]:
        """Activations of each site, estimated but for the fine-tuned one, which is given."""
        estimated = finetuned @ self.weight.to(finetuned) + self.bias.to(finetuned)
        return self._placed(estimated, finetuned)

    def _placed(
        self, estimated: Float[Tensor, "*rows d_others"], own: Float[Tensor, "*rows d_model"]
    ) -> tuple[Float[Tensor, "*rows _"], ...]:
        """Parts of each site, the fine-tuned one's in its place."""
        parts = estimated.split([self.sites[i].d_model for i in self.others], dim=-1)
        found = dict(zip(self.others, parts, strict=True))
        return tuple(found.get(i, own) for i in range(len(self.sites)))

    def quality(
        self, source: ActivationSource, text: TokenizedText, *, batch_size: int = 32
    ) -> EstimateQuality:
        """Measure on held-out text. Raises ValueError for a source with other sites."""
        source = source.side_by_side()
        self.check_sites(source.sites)
        keys = [*self.others, "difference"]
        sums = {k: _Variance() for k in keys}
        for parts in _parts(source, text, batch_size):
            estimated = self(parts[self.finetuned])
            for i in self.others:
                sums[i].add(parts[i], parts[i] - estimated[i])
            difference = parts[self.finetuned] - parts[self.base]
            sums["difference"].add(difference, parts[self.base] - estimated[self.base])
        return EstimateQuality(
            fve={self.sites[i].name: sums[i].explained() for i in self.others},
            difference_fve=sums["difference"].explained(),
            n_tokens=sums["difference"].n,
        )

    def check_sites(self, sites: Sequence[Site]) -> None:
        """Refuse sites that are not those it was fitted on. Raises ValueError."""
        theirs, ours = ([_what(s) for s in of] for of in (self.sites, sites))
        if theirs != ours:
            raise ValueError(
                f"the estimate was fitted on the sites {theirs}, but these are {ours}. Fit another "
                "with BaseEstimate.fit."
            )

    def save(self, folder: str | Path) -> Path:
        """Write the weights and the facts into a folder, each atomically."""
        folder = files.user_path(folder)
        facts = {
            "sites": [s.to_dict() for s in self.sites],
            **{k: getattr(self, k) for k in ("base", "finetuned", "ridge", "n_tokens")},
        }
        files.write_tensors(folder / WEIGHTS_NAME, {"weight": self.weight, "bias": self.bias})
        files.write_json(folder / FACTS_NAME, facts)
        return folder

    @classmethod
    def load(cls, folder: str | Path, *, device: str = "cpu") -> "BaseEstimate":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no estimate there.
            ValueError: a damaged file.
        """
        folder = files.user_path(folder)
        missing = [n for n in (WEIGHTS_NAME, FACTS_NAME) if not (folder / n).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{folder} holds no estimate of the base activation: it has no "
                f"{' and no '.join(missing)}. Write one with BaseEstimate.fit(...).save(folder)."
            )
        try:
            facts = files.read_object(folder / FACTS_NAME, sites=list)
            sites = tuple(Site.from_dict(s) for s in facts.pop("sites"))
            weights = load_file(folder / WEIGHTS_NAME, device=device)
            return cls(sites=sites, weight=weights["weight"], bias=weights["bias"], **facts)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder} holds a damaged estimate of the base activation ({error}). Fit it again."
            ) from error


class _Variance:
    """Sums for 1 - sum ||error||^2 / sum ||y - mean||^2."""

    def __init__(self) -> None:
        self.n, self.total, self.squares, self.errors = 0, torch.zeros(()), 0.0, 0.0

    def add(self, y: Float[Tensor, "n d"], error: Float[Tensor, "n d"]) -> None:
        self.n, self.total = self.n + len(y), self.total + y.sum(dim=0)
        self.squares += y.square().sum().item()
        self.errors += error.square().sum().item()

    def explained(self) -> float:
        variance = self.squares - self.total.square().sum().item() / max(1, self.n)
        return 1 - self.errors / variance if variance > 0 else float("nan")


def _parts(
    source: ActivationSource, text: TokenizedText, batch_size: int
) -> Iterator[tuple[Float[Tensor, "n d"], ...]]:
    """Activations of each site at the tokens that count, float64."""
    for rows in harvest_rows(source, text, batch_size=batch_size):
        yield site_parts(rows.double(), source.sites)


def _what(site: Site) -> tuple[str | int | None, ...]:
    names = site.model_name, site.revision, site.adapter
    return site.name, site.hook_name, site.d_model, *names


@dataclass(frozen=True, kw_only=True)
class LatentAgreement:
    """Tokens on which a latent is active, by its codes and by the estimate."""

    latent: int
    n_exact: int
    """Tokens on which it is active."""
    n_estimated: int
    """Tokens on which it is active by the estimate."""
    n_both: int
    agreement: float
    """Tokens of both over tokens of either (Jaccard 1912); NaN where there are none."""

    @classmethod
    def of(cls, latent: int, n_exact: int, n_estimated: int, n_both: int) -> "LatentAgreement":
        """A row from counts of tokens."""
        either = n_exact + n_estimated - n_both
        return cls(
            latent=latent,
            n_exact=n_exact,
            n_estimated=n_estimated,
            n_both=n_both,
            agreement=n_both / either if either else float("nan"),
        )


@dataclass(frozen=True, kw_only=True)
class EstimateLoss(TableOfRows):
    """What the estimate loses, a row a latent."""

    ROW: ClassVar[type] = LatentAgreement
    rows: tuple[LatentAgreement, ...]
    mode: str
    base_fve: float
    """Fraction of variance of the base activation that the estimate explains."""
    difference_fve: float
    """Fraction of variance of x^1 - x^0 that it explains; see `EstimateQuality`."""
    shift_error: float
    """sum ||s - estimated s||^2 / sum ||s||^2, s the shift of the exact ablation; NaN of none."""
    kl: float
    """KL(exact ablation || estimated), nats a predicted token."""
    kl_of_ablation: float
    """KL(exact ablation || no ablation): what `kl` is to be compared with."""
    n_tokens: int
