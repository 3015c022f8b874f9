"""The registry: dictionaries by release and id, as in SAELens, with their sites and revisions.

    find("tl_crosscoder-taboo", "batchtopk").where        # "embedded"

`pretrained/registry.yaml` has the schema of SAELens's `pretrained_saes.yaml` and, besides, `sites`
and `revision` of each release, `recipe`, `d_sae`, `fve` and `n_bytes` of each dictionary. The
`repo_id` `tl_crosscoder` is this package. Nothing here imports torch. Limit: rows of other people's
repositories have no numbers, since they have not been measured here.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import yaml

from tl_crosscoder.files import WEIGHTS_NAME, size_text
from tl_crosscoder.models.pretrained import PREFIX, pretrained_folder
from tl_crosscoder.results.measures import MEASURES
from tl_crosscoder.results.render import Section, as_text

if TYPE_CHECKING:
    from tl_crosscoder.models.site import Site

EMBEDDED = PREFIX.removesuffix("/")
"""The `repo_id` of what travels with the package."""
DICTIONARIES = pretrained_folder() / "dictionaries"
REGISTRY_PATH = pretrained_folder() / "registry.yaml"
WEIGHTS = {
    None: WEIGHTS_NAME,
    "dictionary_learning": "model.safetensors",
    "ckkissane": "cc_weights.pt",
}
"""The file of the weights, by `conversion_func`."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One dictionary of the registry, or of a repository on the hub."""

    release: str
    id: str
    repo_id: str
    path: str
    """Folder in the repository; `.` is its root."""
    sites: tuple[dict[str, Any], ...] = ()
    """Values that `Site.from_dict` takes; empty where the files have not been read."""
    revision: str | None = None
    conversion_func: str | None = None
    """Format of another library, which `hub.convert` reads; None is ours."""
    recipe: str | None = None
    d_sae: int | None = None
    l0: float | None = None
    fve: dict[str, float] = field(default_factory=dict)
    """FVE by site, then of the `difference`; what has not been measured is left out."""
    n_bytes: int | None = None
    """Size of the weights."""
    scales: Sequence[float] | None = None
    """Factors of the sites' activations in training, see `hub.convert`."""

    @classmethod
    def from_files(
        cls,
        repo: str,
        id: str,
        *,
        cfg: Mapping[str, Any],
        record: Mapping[str, Any] | None,
        analysis: Mapping[str, Any] | None,
    ) -> "Entry":
        """An entry for a dictionary of a repository, from the content of its JSON files."""
        measured = (analysis or {}).get("reconstruction", {})
        fve = measured.get("fve", {})
        if measured.get("difference_fve") is not None:  # a diff-SAE has it among its sites
            fve = fve | {"difference": measured["difference_fve"]}
        return cls(
            release=repo,
            id=id,
            repo_id=repo,
            path=id,
            sites=tuple(cfg["sites"]),
            recipe=None if record is None else _recipe(record),
            d_sae=cfg["d_sae"],
            l0=measured.get("l0"),
            fve={name: value for name, value in fve.items() if value is not None},
        )

    @property
    def is_embedded(self) -> bool:
        """Whether it travels with the package."""
        return self.repo_id == EMBEDDED

    @property
    def folder(self) -> Path:
        """Folder of an embedded dictionary."""
        assert self.is_embedded
        return DICTIONARIES / self.path

    @property
    def where(self) -> Literal["embedded", "cached", "hub"]:
        """Whether loading it needs the network: only `hub` does."""
        if self.is_embedded:
            return "embedded"
        from huggingface_hub import try_to_load_from_cache

        name = self.in_repository(WEIGHTS[self.conversion_func])
        found = try_to_load_from_cache(self.repo_id, name, revision=self.revision)
        return "cached" if isinstance(found, str) else "hub"

    @property
    def hook_names(self) -> list[str]:
        """Hook points of the sites, each once."""
        return list(dict.fromkeys(s["hook_name"] for s in self._read_sites()))

    @property
    def model_names(self) -> list[str]:
        """Models of the sites, each once, by the adapter's name where there is one."""
        names = (s.get("adapter") or s["model_name"] for s in self._read_sites())
        return list(dict.fromkeys(names))

    def _read_sites(self) -> list[dict[str, Any]]:
        """The sites; for a difference the two that it is between, the subtracted one first."""
        return [s for site in self.sites for s in (site.get("minus"), site) if s]

    def in_repository(self, name: str) -> str:
        """Path in the repository of a file of the dictionary."""
        return str(PurePosixPath(self.path, name))

    def as_sites(self) -> "tuple[Site, ...]":
        """The sites as objects; this imports torch."""
        from tl_crosscoder.models.site import Site

        return tuple(Site.from_dict(s) for s in self.sites)


def _recipe(record: Mapping[str, Any]) -> str:
    """`delta, k = 12, delta loss 1`: the preset, or else the sparsity, with what decides most."""
    sparsity, delta = record["sparsity"], record["delta_loss"]
    preset = record["training"].get("preset")
    # Records of the embedded dictionaries hold the name alone.
    name = preset["name"] if isinstance(preset, Mapping) else preset
    named = [name or sparsity["kind"]]
    named += [f"k = {sparsity['k']:g}"] if "k" in sparsity else []
    named += [f"delta loss {delta['weight']:g}"] if delta else []
    return ", ".join(named)


@cache
def entries(path: Path = REGISTRY_PATH) -> tuple[Entry, ...]:
    """Every dictionary of a file in the registry's schema, in its order.

    Raises ValueError for a release or dictionary without one of the fields.
    """
    releases: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    names = [f.name for f in fields(Entry)]
    found = []
    for release, shared in releases.items():
        for own in shared["saes"]:
            values = {"release": release, **shared, **own}
            if missing := [n for n in ("id", "repo_id", "path", "sites") if n not in values]:
                raise ValueError(f"{path}: a dictionary of {release} has no {missing[0]!r}.")
            known = {n: values[n] for n in names if n in values}
            known["sites"] = tuple(known["sites"])  # YAML has lists alone
            found.append(Entry(**known))
    return tuple(found)


def find(release: str, sae_id: str) -> Entry:
    """The dictionary of that name, in the registry or else in the repository `owner/name`.

    Raises:
        ValueError: no such release that could not be a repository either, or no such id in it.
    """
    ids = [e.id for e in entries() if e.release == release]
    if not ids:
        if "/" in release and not release.startswith(PREFIX):
            return Entry(release=release, id=sae_id, repo_id=release, path=sae_id)
        names = list(dict.fromkeys(e.release for e in entries()))
        raise ValueError(
            f"{release!r} is not a release in the registry{nearest(release, names)}, and not a "
            "repository of the hub (owner/name). `tl-crosscoder list` shows the releases; for a "
            f"folder here, use Crosscoder.load({release!r})."
        )
    if sae_id not in ids:
        raise ValueError(
            f"{sae_id!r} is not a dictionary of {release}{nearest(sae_id, ids)}; it has {ids}. "
            "`tl-crosscoder list` shows them all."
        )
    return next(e for e in entries() if (e.release, e.id) == (release, sae_id))


def nearest(name: str, known: Iterable[str]) -> str:
    """`; nearest: 'x'` where something is similar, or nothing."""
    by_case = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), by_case, n=1, cutoff=0.5)
    return f"; nearest: {by_case[found[0]]!r}" if found else ""


def _cells(entry: Entry) -> dict[str, str]:
    """What is known of a dictionary besides its models; `-` where nothing is."""
    return {
        "id": entry.id,
        "recipe": entry.recipe or "-",
        "d_sae": "-" if entry.d_sae is None else f"{entry.d_sae:,}",
        "l0": "-" if entry.l0 is None else f"{entry.l0:.1f}",
        "fve": ", ".join(f"{v:.3f}" for v in entry.fve.values()) or "-",
        "size": "-" if entry.n_bytes is None else size_text(entry.n_bytes),
    }


def terminal_table(entries: Sequence[Entry]) -> str:
    """Releases with the dictionaries of each and where they are, and how to load one."""
    sections = []
    for release, group in groupby(entries, key=lambda e: e.release):
        own = [*group]
        rows = [_cells(e) | {"where": e.where} for e in own]
        title = f"{release}: {' -> '.join(own[0].model_names)} at {', '.join(own[0].hook_names)}"
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        sections.append(Section(title=title, columns=columns))
    one = entries[0]
    load = f'Load one: Crosscoder.from_pretrained("{one.release}", "{one.id}")'
    run = f"Embedded ones need no network and are runs: tl-crosscoder analyze {PREFIX}{one.path}"
    fve = "FVE: of base, fine-tuned model and difference."
    return as_text([*sections, Section(notes=[fve, load, run])])


def markdown_table(entries: Sequence[Entry]) -> str:
    """One row a dictionary, with its repository, for the documentation."""
    rows = [
        {
            "release": f"`{e.release}`",
            "id": f"`{e.id}`",
            "models": " → ".join(f"`{name}`" for name in e.model_names),
            "hook": ", ".join(f"`{hook}`" for hook in e.hook_names),
            **{name: cell for name, cell in _cells(e).items() if name != "id"},
            "from": "this package" if e.is_embedded else f"`{e.repo_id}`",
        }
        for e in entries
    ]
    names = [MEASURES[n].label if n in MEASURES else n for n in rows[0]]
    lines = [names, ["---"] * len(names), *(row.values() for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
