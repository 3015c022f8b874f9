"""What one pass over activations tells of each site, as sums and counts that add up over shards.

Mean and mean squared norm are over the tokens that count. Norms, sinks (norm above `SINK_MULTIPLE`
times the median) and ||x^1 - x^0|| by position are over all tokens, BOS among them; by role over
all but BOS and the first positions. Limit: the difference needs two sites of one width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import REASONS, TokenizedText
from tl_crosscoder.models.site import Site, site_parts, subtracted_sites

SINK_MULTIPLE = 10.0
"""A token whose norm is above so many times the site's median is a sink."""
_UNLIKE = ("bos", "first", "padding")


@dataclass(frozen=True)
class StatisticsSums:
    """Sums in float64 by name; add those of several texts."""

    sums: Mapping[str, Tensor]

    @classmethod
    def of(
        cls,
        rows: Float[Tensor, "tokens *row"],
        text: TokenizedText,
        sites: Sequence[Site],
        *,
        sink_limits: Sequence[float],
        n_positions: int,
    ) -> "StatisticsSums":
        """Sums of some contexts.

        Args:
            rows: of every token but padding.
            text: these contexts, with the final mask.
            sites: of the rows.
            sink_limits: norm from which a token is a sink, for each site.
            n_positions: of the whole text; these contexts may be cut.
        """
        is_token = text.dropped != REASONS.index("padding")
        counts = text.mask[is_token].to(rows.device)
        position = torch.arange(text.context_size).expand_as(is_token)[is_token].to(rows.device)
        parts = site_parts(rows, sites)
        norms = torch.stack([part.norm(dim=1) for part in parts], dim=1).double()
        is_sink = norms > torch.tensor(sink_limits, dtype=torch.float64, device=rows.device)
        by_position = torch.cat([torch.ones_like(norms[:, :1]), norms, is_sink.double()], dim=1)
        sums = {
            "n": counts.sum().double(),
            "squared_norm": norms[counts].square().sum(dim=0),
            "n_sinks": is_sink[counts].double().sum(dim=0),
            "by_position": _summed(by_position, position, n_positions),
        }
        for i, part in enumerate(parts):
            sums[f"sum_{i}"] = part[counts].sum(dim=0).double()
        pair = subtracted_sites(sites)
        if pair is not None:
            difference = (parts[pair[1]] - parts[pair[0]]).norm(dim=1).double()
            both = torch.stack([torch.ones_like(difference), difference], dim=1)
            unlike = torch.tensor([REASONS.index(r) for r in _UNLIKE])
            alike = ~torch.isin(text.dropped[is_token], unlike).to(rows.device)
            role = text.role_ids[is_token].to(rows.device).long()
            sums["difference_by_position"] = _summed(difference[:, None], position, n_positions)
            sums["difference_by_role"] = _summed(both[alike], role[alike], len(ROLES))
        return cls({name: value.cpu() for name, value in sums.items()})

    def __add__(self, other: "StatisticsSums") -> "StatisticsSums":
        return StatisticsSums({k: v + other.sums[k] for k, v in self.sums.items()})

    def means(self, sites: Sequence[Site]) -> dict[str, Float[Tensor, " d_model"]]:
        """The mean activation of each site, by name."""
        n = self.sums["n"].clamp_min(1)
        return {s.name: (self.sums[f"sum_{i}"] / n).float() for i, s in enumerate(sites)}

    def result(self, sites: Sequence[Site]) -> dict[str, Any]:
        """The statistics as plain JSON, NaN as None."""
        n, n_sites = self.sums["n"].clamp_min(1), len(sites)
        at = self.sums["by_position"]
        norms, sinks = (part / at[:, :1] for part in at[:, 1:].split(n_sites, dim=1))
        means = self.means(sites)
        out: dict[str, Any] = {
            "n_tokens": int(self.sums["n"]),
            "n_by_position": at[:, 0].int().tolist(),
            "sites": {
                site.name: {
                    "norm_of_mean": means[site.name].norm().item(),
                    "mean_squared_norm": (self.sums["squared_norm"][i] / n).item(),
                    "sink_share": (self.sums["n_sinks"][i] / n).item(),
                    "mean_norm_by_position": _plain(norms[:, i]),
                    "sink_share_by_position": _plain(sinks[:, i]),
                }
                for i, site in enumerate(sites)
            },
        }
        if "difference_by_role" in self.sums:
            n_role, by_role = self.sums["difference_by_role"].unbind(dim=1)
            by_position = self.sums["difference_by_position"][:, 0] / at[:, 0]
            out["difference"] = {
                "mean_norm_by_position": _plain(by_position),
                "mean_norm_by_role": dict(zip(ROLES, _plain(by_role / n_role), strict=True)),
                "n_by_role": dict(zip(ROLES, n_role.int().tolist(), strict=True)),
            }
        return out


def _summed(values: Float[Tensor, "n m"], group: Tensor, n_groups: int) -> Float[Tensor, "g m"]:
    out = torch.zeros(n_groups, values.shape[1], dtype=torch.float64, device=values.device)
    return out.index_add_(0, group, values)


def _plain(values: Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]
