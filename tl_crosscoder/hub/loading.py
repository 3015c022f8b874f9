"""Load a `Crosscoder` by release or repository and id; embedded ones need no network.

Importing this module fills in `Crosscoder.from_pretrained`, which raises the errors of the hub in
words and names the ids that a repository has instead. Limit: a repository's own dictionaries are
folders with a `cfg.json`.
"""

from dataclasses import replace
from pathlib import Path

from tl_crosscoder import files
from tl_crosscoder.crosscoder.crosscoder import Crosscoder
from tl_crosscoder.files import CFG_NAME, WEIGHTS_NAME
from tl_crosscoder.hub.registry import WEIGHTS, Entry, find, nearest
from tl_crosscoder.models.devices import devices_of
from tl_crosscoder.models.hub_errors import explained
from tl_crosscoder.progress import note


def load_pretrained(
    release: str,
    sae_id: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    force_download: bool = False,
) -> Crosscoder:
    """Load the dictionary `sae_id` of a release, or of a repository `owner/name[@revision]`.

    Raises:
        ValueError: no such release, repository, revision or dictionary (the nearest is named), a
            folder that is here, no such device, or a hub that does not answer.
    """
    devices_of(device, 1)
    _refuse_a_folder(release, sae_id)
    release, at, named = release.partition("@")
    if at and revision not in (None, named):
        raise ValueError(
            f"'{release}@{named}' names the revision {named!r}, and revision={revision!r} another "
            "one. Give one of them."
        )
    entry, revision = find(release, sae_id), named or revision
    if entry.is_embedded:
        if revision is not None:
            raise ValueError(
                f"{release} comes with the package and has no revision {revision!r}: leave it out."
            )
        return Crosscoder.load(entry.folder, device=device)
    entry = replace(entry, revision=revision or entry.revision)
    if entry.conversion_func is None:
        return Crosscoder.load(_fetched(entry, force_download), device=device)
    crosscoder = _converted(entry, force_download)
    crosscoder.cfg.device = device
    return crosscoder.to(device)


Crosscoder.pretrained_loader = load_pretrained


def _refuse_a_folder(release: str, sae_id: str) -> None:
    path = files.user_path(release)
    here = next((p for p in (path / sae_id, path) if (p / CFG_NAME).is_file()), None)
    is_path_like = release.startswith((".", "/", "~")) or "\\" in release
    if here is not None or is_path_like:
        raise ValueError(
            f"{release!r} is a folder, not a release or a repository of the hub. Load it with "
            f"Crosscoder.load({str(here or path)!r})."
        )


def _fetched(entry: Entry, force_download: bool) -> Path:
    """The folder of one of our dictionaries in the hub's cache, downloaded where it is missing."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    with explained(entry.repo_id, entry.revision):
        try:
            _download(entry, CFG_NAME, force_download)
            return _download(entry, WEIGHTS_NAME, force_download).parent
        except RemoteEntryNotFoundError:
            ids = _ids(entry)
    raise ValueError(
        f"{entry.repo_id} has no dictionary {entry.path!r}{nearest(entry.path, ids)}: a dictionary "
        f"is a folder with {CFG_NAME} and {WEIGHTS_NAME}, and it has {ids or 'none'}. If it is of "
        "another library, use `tl-crosscoder import`."
    )


def _converted(entry: Entry, force_download: bool) -> Crosscoder:
    """A dictionary in another library's format."""
    from tl_crosscoder.hub.convert import convert  # with all that makes runs, rarely needed here

    with explained(entry.repo_id, entry.revision):
        _download(entry, WEIGHTS[entry.conversion_func], force_download)
    return convert(
        entry.repo_id if entry.path == "." else f"{entry.repo_id}/{entry.path}",
        sites=entry.as_sites(),
        scales=entry.scales,
        revision=entry.revision,
    )


def _download(entry: Entry, name: str, force_download: bool) -> Path:
    """A file of a dictionary in the hub's cache; large ones are announced."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    path, revision = entry.in_repository(name), entry.revision
    is_here = isinstance(try_to_load_from_cache(entry.repo_id, path, revision=revision), str)
    if name != CFG_NAME and (force_download or not is_here):
        at = "" if revision is None else f" at {revision}"
        note(f"Downloading {path} of {entry.repo_id}{at} from the hub.")
    return Path(
        hf_hub_download(entry.repo_id, path, revision=revision, force_download=force_download)
    )


def _ids(entry: Entry) -> list[str]:
    """Folders of the repository that hold a dictionary of ours."""
    from huggingface_hub import HfApi

    names = set(HfApi().list_repo_files(entry.repo_id, revision=entry.revision))
    folders = {name.rpartition("/")[0] for name in names if name.endswith(CFG_NAME)}
    return sorted(f or "." for f in folders if str(Path(f, WEIGHTS_NAME)) in names)
