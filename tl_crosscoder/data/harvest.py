"""Run models over text and give the activations of its kept tokens.

A row is one token of one text at every site, `[n_sites, d_model]` or `[d_in]` (see
`site.row_shape`); rows never part from their sites. Contexts of unequal length run longest first,
each batch cut at its longest context. Several processes share the batches out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.tokens import DROP_REASONS, TokenizedText
from tl_crosscoder.mesh import ALONE, Axis
from tl_crosscoder.models.site import Site, site_parts, subtracted_sites
from tl_crosscoder.models.source import ActivationSource
from tl_crosscoder.progress import progress

_MEDIAN_CONTEXTS = 16
"""Contexts on which the median norm is measured."""


@dataclass(frozen=True, kw_only=True)
class Harvested:
    """Some contexts of a text and the activations of their kept tokens."""

    index: Int[Tensor, " contexts"]
    """Positions of these contexts in the text."""
    text: TokenizedText
    """These contexts, perhaps cut at the right; the rows are in the order of its `mask`."""
    rows: Float[Tensor, "tokens *row"]

    def positions(self, context_size: int) -> Int[Tensor, " tokens"]:
        """Place of each row in the text: index of its context x context_size + its position."""
        starts = self.index[:, None] * context_size
        return (starts + torch.arange(self.text.context_size))[self.text.mask]

    def split(self, n_rows: int) -> Iterator["Harvested"]:
        """Pieces of whole contexts, of about `n_rows` rows and at least one context each."""
        n = max(1, n_rows // self.text.context_size)
        n_kept = self.text.mask.sum(dim=1)
        rows = self.rows.split([int(counts.sum()) for counts in n_kept.split(n)])
        for i, (index, own_rows) in enumerate(zip(self.index.split(n), rows, strict=True)):
            yield Harvested(index=index, text=self.text[i * n : (i + 1) * n], rows=own_rows)


def harvest(
    source: ActivationSource,
    text: TokenizedText,
    *,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
    description: str | None = None,
    axis: Axis = ALONE,
) -> Iterator[Harvested]:
    """Contexts and the rows of their kept tokens, `batch_size` contexts at a time.

    Packed text keeps its order; contexts of unequal lengths are sorted by length. A description
    shows a progress bar. Of several processes each gives other contexts.
    """
    batches = shared_batches(text, batch_size, axis)
    bar = progress(batches, desc=description, unit="batch", show=description is not None)
    for index, part in bar:
        part, rows = finite_rows(source, part, source.rows(part, dtype=dtype))
        if part.norm_limits is not None:
            keep = within_limits(rows, source.sites, part.norm_limits)
            part, rows = without(part, keep, reason="norm"), rows[keep]
        yield Harvested(index=index, text=part, rows=rows)


def harvest_rows(
    source: ActivationSource,
    text: TokenizedText,
    *,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Float[Tensor, "tokens *row"]]:
    """Rows of the kept tokens, `batch_size` contexts at a time; see `harvest` for their order."""
    for part in harvest(source, text, batch_size=batch_size, dtype=dtype):
        yield part.rows


def batches_of(
    text: TokenizedText, batch_size: int
) -> list[tuple[Int[Tensor, " contexts"], TokenizedText]]:
    """Contexts in batches of about equal lengths, each with their positions in the text."""
    lengths = text.lengths
    if not len(text) or bool((lengths == text.context_size).all()):
        order = torch.arange(len(text))
    else:
        order = lengths.argsort(descending=True, stable=True)
    return [
        (index, text[index].cut(int(lengths[index].max()))) for index in order.split(batch_size)
    ]


def shared_batches(
    text: TokenizedText, batch_size: int, axis: Axis
) -> Sequence[tuple[Int[Tensor, " contexts"], TokenizedText]]:
    """Those of `batches_of` that this process takes, smaller ones where some would have none.

    Raises:
        ValueError: fewer contexts than processes.
    """
    if axis.size > 1 and len(text) < axis.size:
        raise ValueError(
            f"{len(text)} contexts cannot be shared out to {axis.size} processes: start fewer "
            "(--workers)."
        )
    return axis.own(batches_of(text, min(batch_size, max(1, len(text) // axis.size))))


# --- attention sinks ------------------------------------------------------------------------------


def with_norm_limits(
    source: ActivationSource,
    text: TokenizedText,
    *,
    multiple: float | None,
    batch_size: int = 32,
) -> TokenizedText:
    """A text that drops tokens whose norm at any site is above a limit.

    The limit of a site is `multiple` times the median norm of the kept tokens in the first 16
    contexts. None sets no limit.
    """
    if multiple is None:
        return text
    medians = median_norms(source, text, batch_size=batch_size)
    return replace(text, norm_limits=tuple(multiple * median for median in medians))


def median_norms(source: ActivationSource, text: TokenizedText, *, batch_size: int) -> list[float]:
    """Median norm of the kept tokens at each site, over the first contexts of a text."""
    sample = torch.cat([*harvest_rows(source, text[:_MEDIAN_CONTEXTS], batch_size=batch_size)])
    return [part.norm(dim=-1).median().item() for part in site_parts(sample, source.sites)]


def within_limits(
    rows: Float[Tensor, "tokens *row"], sites: Sequence[Site], limits: Sequence[float]
) -> Bool[Tensor, " tokens"]:
    """True for rows whose norm is at most the limit at every site."""
    parts = zip(site_parts(rows, sites), limits, strict=True)
    return torch.stack([part.norm(dim=-1) <= limit for part, limit in parts]).all(dim=0)


def without(text: TokenizedText, keep: Bool[Tensor, " tokens"], *, reason: str) -> TokenizedText:
    """Contexts that drop those of their kept tokens where `keep` is False."""
    dropped = text.dropped.clone()
    dropped[text.mask] = torch.where(keep.cpu(), 0, DROP_REASONS.index(reason)).to(dropped.dtype)
    return replace(text, dropped=dropped)


# --- activations that are no numbers --------------------------------------------------------------


def finite_rows(
    source: ActivationSource, text: TokenizedText, rows: Float[Tensor, "tokens *row"]
) -> tuple[TokenizedText, Float[Tensor, "kept *row"]]:
    """Contexts and rows without the tokens that are NaN or infinite at a site.

    Raises ValueError for such a token, unless the text drops them.
    """
    keep = is_finite(rows)
    if keep is None:
        return text, rows
    if not text.drops_nonfinite:
        raise ValueError(_nonfinite_message(source, rows))
    return without(text, keep, reason="nonfinite"), rows[keep]


def is_finite(rows: Float[Tensor, "tokens *row"]) -> Bool[Tensor, " tokens"] | None:
    """True for rows whose squares are numbers; None where all are, which one product tells.

    Norms and losses are sums of squares, which float32 has up to values of about 1e19.
    """
    flat = rows.reshape(-1)
    if bool((flat @ flat if flat.dtype == torch.float32 else flat.sum()).isfinite()):
        return None
    keep = _has_norm(rows)
    return None if bool(keep.all()) else keep


def check_finite(source: ActivationSource, rows: Float[Tensor, "tokens *row"]) -> None:
    """Raise ValueError for rows of which one is NaN, infinite or beyond float32's squares."""
    if is_finite(rows) is not None:
        raise ValueError(_nonfinite_message(source, rows))


def _has_norm(rows: Float[Tensor, "tokens *row"]) -> Bool[Tensor, " tokens"]:
    return rows.flatten(1).float().square().sum(dim=1).isfinite()


def _nonfinite_message(source: ActivationSource, rows: Float[Tensor, "tokens *row"]) -> str:
    parts = zip(source.sites, site_parts(rows, source.sites), strict=True)
    counts = {site: int((~_has_norm(part)).sum()) for site, part in parts}
    where = ", ".join(f"{n:,} at {s.name!r} ({s.hook_name})" for s, n in counts.items() if n)
    is_float16 = source.computed_in.startswith("torch.float16")
    remedy = (
        "float16 ends at 65,504: load the models in bfloat16 or float32 (dtype, --dtype bfloat16)"
        if is_float16
        else "Check the weights of the models"
    )
    return (
        f"of {len(rows):,} tokens the activation, or its square, is NaN or infinite for {where}; "
        f"it was computed in {source.computed_in.removeprefix('torch.')}. {remedy}, or leave these "
        "tokens out and count them (on_nonfinite='drop', --on-nonfinite drop)."
    )


# --- statistics of the sites ----------------------------------------------------------------------

SINK_MULTIPLE = 10.0
"""A token whose norm is above this multiple of its site's median is a sink."""
_HAVE_NO_ROW = torch.tensor([DROP_REASONS.index(reason) for reason in ("padding", "nonfinite")])
_START = torch.tensor([DROP_REASONS.index(reason) for reason in ("bos", "first", "padding")])


def site_sums(
    rows: Float[Tensor, "tokens *row"],
    text: TokenizedText,
    sites: Sequence[Site],
    *,
    sink_limits: Sequence[float],
    n_positions: int,
) -> dict[str, Tensor]:
    """Sums in float64 over the tokens of some contexts; those of several contexts add up.

    Args:
        rows: of every token that `has_row`, dropped ones included.
        text: these contexts, with the final mask.
        sites: of the rows.
        sink_limits: norm from which a token is a sink, for each site.
        n_positions: context size of the whole text, of which these contexts may be cut.
    """
    is_token = has_row(text)
    kept = text.mask[is_token].to(rows.device)
    position = torch.arange(text.context_size).expand_as(is_token)[is_token].to(rows.device)
    # BOS and the first positions, where norms are largest, would hide how roles differ.
    in_role = ~torch.isin(text.dropped[is_token], _START).to(rows.device)
    role = text.role_ids[is_token].to(rows.device).long()
    norms = torch.stack([x.norm(dim=1) for x in sites_and_difference(rows, sites)], dim=1).double()
    limits = torch.tensor(sink_limits, dtype=torch.float64, device=rows.device)
    is_sink = (norms[:, : len(sites)] > limits).double()
    values = torch.cat([torch.ones_like(norms[:, :1]), norms, norms.square(), is_sink], dim=1)
    sums = {
        "kept": values[kept].sum(dim=0, keepdim=True),
        "by_position": _grouped(values, position, n_positions),
        "by_role": _grouped(values[in_role], role[in_role], len(ROLES)),
        "rows": rows[kept].flatten(1).sum(dim=0, keepdim=True).double(),
    }
    return {name: value.cpu() for name, value in sums.items()}


def has_row(text: TokenizedText) -> Bool[Tensor, "contexts pos"]:
    """True for every token that is real and has finite activations, dropped ones included."""
    return ~torch.isin(text.dropped, _HAVE_NO_ROW)


def sites_and_difference(
    rows: Float[Tensor, "tokens *row"], sites: Sequence[Site]
) -> list[Float[Tensor, "tokens d_model"]]:
    """Activations of each site, and x^1 - x^0 at the end if two sites have one width."""
    parts, pair = [*site_parts(rows, sites)], subtracted_sites(sites)
    return parts if pair is None else [*parts, parts[pair[1]] - parts[pair[0]]]


def site_statistics(sums: Mapping[str, Tensor], sites: Sequence[Site]) -> dict[str, Any]:
    """Statistics as plain JSON, from the sums of all contexts; the mean of no token is None.

    Mean, mean squared norm and share of sinks are over kept tokens. By position they are over all
    tokens, BOS among them; by role over all but BOS and the first positions. The difference
    ||x^1 - x^0|| needs two sites of one width.
    """
    has_difference = subtracted_sites(sites) is not None
    n_norms = len(sites) + has_difference
    columns = [n_norms, n_norms, len(sites)]  # norms, squared norms, sinks
    kept, by_position, by_role = (
        (sums[name][:, 1:] / sums[name][:, :1]).split(columns, dim=1)
        for name in ("kept", "by_position", "by_role")
    )
    means = site_parts(sums["rows"] / sums["kept"][:, :1], sites)
    out: dict[str, Any] = {
        "n_tokens": int(sums["kept"][0, 0]),
        "n_by_position": sums["by_position"][:, 0].int().tolist(),
        "sites": {
            site.name: {
                "norm_of_mean": means[i].norm().item(),
                "mean_squared_norm": kept[1][0, i].item(),
                "sink_share": kept[2][0, i].item(),
                "mean_norm_by_position": _plain(by_position[0][:, i]),
                "sink_share_by_position": _plain(by_position[2][:, i]),
            }
            for i, site in enumerate(sites)
        },
    }
    if has_difference:
        n_by_role = sums["by_role"][:, 0].int().tolist()
        out["difference"] = {
            "mean_norm_by_position": _plain(by_position[0][:, -1]),
            "mean_norm_by_role": dict(zip(ROLES, _plain(by_role[0][:, -1]), strict=True)),
            "n_by_role": dict(zip(ROLES, n_by_role, strict=True)),
        }
    return out


def _grouped(values: Float[Tensor, "n m"], group: Tensor, n_groups: int) -> Float[Tensor, "g m"]:
    sums = torch.zeros(n_groups, values.shape[1], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, group, values)


def _plain(values: Tensor) -> list[float | None]:
    return [None if v != v else v for v in values.tolist()]
