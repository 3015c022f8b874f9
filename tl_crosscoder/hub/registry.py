"""The registry: dictionaries by release and id, as in SAELens, with their sites and revisions.

    find("tl_crosscoder-taboo", "batchtopk").where        # "embedded"

Contract: `pretrained/registry.yaml` has the schema of SAELens's `pretrained_saes.yaml` and, for
each release, `revision` and `sites`, for each dictionary `preset`, `d_sae`, `fve` and `n_bytes`. A
`repo_id` of `tl_crosscoder` is this package. Nothing here imports torch. Limit: what was not
measured here is left out, so rows of other people's repositories have no numbers.

The registry as tables: for the terminal, and for the documentation.

Contract: a line a dictionary, under its release; what is not known is `-`. Limit: where a
dictionary is (embedded, cached, hub) is that of this machine, so the documentation has no such
column but for what travels with the package.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from tl_crosscoder.models.pretrained import PREFIX, pretrained_folder

if TYPE_CHECKING:
    from tl_crosscoder.models.site import Site

EMBEDDED = PREFIX.removesuffix("/")
"""The `repo_id` of what travels with the package."""
WEIGHTS = {
    None: "sae_weights.safetensors",
    "dictionary_learning": "model.safetensors",
    "ckkissane": "cc_weights.pt",
}
"""The file of the weights, by `conversion_func`."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dictionary of the registry."""

    release: str
    id: str
    repo_id: str
    path: str
    """Folder in the repository; `.` is its root."""
    model: str
    revision: str | None
    conversion_func: str | None
    """Format of another library, which `hub.convert` reads; None is ours."""
    sites: tuple["dict[str, Any]", ...]
    """As `Site.from_dict` takes them."""
    preset: str | None = None
    d_sae: int | None = None
    l0: float | None = None
    fve: dict[str, float] = field(default_factory=dict)
    """Per site, and of the `difference`."""
    n_bytes: int | None = None
    """Size of the weights."""
    scales: tuple[float, ...] | None = None
    """See `hub.convert`."""

    @property
    def is_embedded(self) -> bool:
        """Whether it travels with the package."""
        return self.repo_id == EMBEDDED

    @property
    def run_name(self) -> str:
        """What the command line takes for the run of an embedded dictionary."""
        return PREFIX + self.path

    @property
    def folder(self) -> Path:
        """Where an embedded dictionary is."""
        assert self.is_embedded
        return dictionaries_folder() / self.path

    @property
    def where(self) -> Literal["embedded", "cached", "hub"]:
        """Whether loading it needs the network: only `hub` does."""
        if self.is_embedded:
            return "embedded"
        from huggingface_hub import try_to_load_from_cache

        name = in_repository(self.path, WEIGHTS[self.conversion_func])
        found = try_to_load_from_cache(self.repo_id, name, revision=self.revision)
        return "cached" if isinstance(found, str) else "hub"

    @property
    def hook_names(self) -> list[str]:
        """Of the sites, each once."""
        return list(dict.fromkeys(s["hook_name"] for s in self.sites))

    @property
    def model_names(self) -> list[str]:
        """Of the sites, each once: the adapter's name where there is one."""
        return list(dict.fromkeys(s.get("adapter") or s["model_name"] for s in self.sites))

    def as_sites(self) -> "tuple[Site, ...]":
        """The sites as objects; this imports torch."""
        from tl_crosscoder.models.site import Site

        return tuple(Site.from_dict(s) for s in self.sites)


def in_repository(path: str, name: str) -> str:
    """The path of a file of a dictionary in its repository."""
    return name if path in ("", ".") else f"{path}/{name}"


def dictionaries_folder() -> Path:
    """Where the embedded dictionaries are."""
    return pretrained_folder() / "dictionaries"


def registry_path() -> Path:
    """The YAML file."""
    return pretrained_folder() / "registry.yaml"


@cache
def entries() -> tuple[Entry, ...]:
    """Every dictionary, in the order of the file."""
    return read_entries(registry_path())


def read_entries(path: Path) -> tuple[Entry, ...]:
    """Those of a file in the registry's schema.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a release without one of the fields.
    """
    releases: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    try:
        return tuple(
            _entry(release, shared, own)
            for release, shared in releases.items()
            for own in shared["saes"]
        )
    except KeyError as error:
        raise ValueError(f"{path}: a release or dictionary in it has no {error}.") from error


def _entry(release: str, shared: dict[str, Any], own: dict[str, Any]) -> Entry:
    known = ("preset", "d_sae", "l0", "fve", "n_bytes")
    scales = own.get("scales")
    return Entry(
        release=release,
        id=own["id"],
        repo_id=shared["repo_id"],
        path=own["path"],
        model=shared["model"],
        revision=shared.get("revision"),
        conversion_func=shared.get("conversion_func"),
        sites=tuple(shared["sites"]),
        scales=None if scales is None else tuple(scales),
        **{name: own[name] for name in known if name in own},
    )


def find(release: str, sae_id: str) -> Entry | None:
    """The dictionary of that name; None where the release is a repository of the hub.

    Raises:
        ValueError: no such release that could not be a repository either, or no such id in it.
    """
    ids = [e.id for e in entries() if e.release == release]
    if not ids:
        if "/" in release and not release.startswith(PREFIX):
            return None
        names = list(dict.fromkeys(e.release for e in entries()))
        raise ValueError(
            f"{release!r} is no release in the registry{nearest(release, names)}, and no "
            "repository of the hub (owner/name). `tl-crosscoder list` shows the releases; for a "
            f"folder here, use Crosscoder.load({release!r})."
        )
    if sae_id not in ids:
        raise ValueError(
            f"{sae_id!r} is no dictionary of {release}{nearest(sae_id, ids)}; it has {ids}. "
            "`tl-crosscoder list` shows them all."
        )
    return next(e for e in entries() if (e.release, e.id) == (release, sae_id))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; nearest: 'x'` where something is similar, or nothing."""
    by_case = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.5)
    return f"; nearest: {by_case[found[0]]!r}" if found else ""


_HEADER = ("id", "recipe", "latents", "L0", "FVE base, tuned, diff", "size", "where")


def terminal_table(entries: Sequence[Entry]) -> str:
    """Releases with the dictionaries of each, and how to load one."""
    blocks = []
    rows = [_row(e) for e in entries]
    widths = [max(len(row[i]) for row in [_HEADER, *rows]) for i in range(len(_HEADER))]
    for release, group in groupby(entries, key=lambda e: e.release):
        own = list(group)
        first = own[0]
        pair = f"  {' -> '.join(first.model_names)} at {', '.join(first.hook_names)}"
        lines = [release, pair, *(_line(row, widths) for row in [_HEADER, *map(_row, own)])]
        blocks.append("\n".join(lines))
    example = entries[0]
    blocks.append(
        f'Load one: Crosscoder.from_pretrained("{example.release}", "{example.id}")\n'
        f"Embedded ones need no network and are runs: tl-crosscoder analyze {example.run_name}"
    )
    return "\n\n".join(blocks)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
    return f"  {'  '.join(cells)}".rstrip()


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        entry.id,
        entry.preset or "-",
        "-" if entry.d_sae is None else f"{entry.d_sae:,}",
        "-" if entry.l0 is None else f"{entry.l0:.1f}",
        ", ".join(f"{v:.3f}" for v in entry.fve.values()) or "-",
        "-" if entry.n_bytes is None else f"{entry.n_bytes / 1e6:,.1f} MB",
        entry.where,
    )


def markdown_table(entries: Sequence[Entry]) -> str:
    """One row a dictionary, with its repository."""
    header = ("release", "id", "models", "hook", *_HEADER[1:-1], "from")
    rows = [
        (
            f"`{e.release}`",
            f"`{e.id}`",
            " → ".join(f"`{name}`" for name in e.model_names),
            ", ".join(f"`{hook}`" for hook in e.hook_names),
            *_row(e)[1:-1],
            "this package" if e.is_embedded else f"`{e.repo_id}`",
        )
        for e in entries
    ]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
