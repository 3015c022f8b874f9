"""From a release or a repository and an id to a `Crosscoder`; embedded ones need no network.

Contract: `Crosscoder.from_pretrained` with the errors of the hub explained and the ids that a
repository has instead named. Limit: a repository's own dictionaries are folders with a `cfg.json`.
"""

import sys
from pathlib import Path

from tqdm.auto import tqdm

from tl_crosscoder.crosscoder.crosscoder import CFG_NAME, WEIGHTS_NAME, Crosscoder
from tl_crosscoder.hub.convert import convert
from tl_crosscoder.hub.registry import WEIGHTS, Entry, find, in_repository, nearest
from tl_crosscoder.models.devices import devices_of
from tl_crosscoder.models.hub_errors import explained


def load_pretrained(
    release: str,
    sae_id: str,
    *,
    device: str = "cpu",
    revision: str | None = None,
    force_download: bool = False,
) -> Crosscoder:
    """The dictionary `sae_id` of a release, or of a repository `owner/name` or `owner/name@v1`.

    Raises:
        ValueError: no such release, repository, revision or dictionary (the nearest is named), a
            folder that is here, no such device, or a hub that does not answer.
    """
    devices_of(device, 1)
    _refuse_a_folder(release, sae_id)
    release, revision = _revision_of(release, revision)
    entry = find(release, sae_id)
    if entry is None:
        folder = _fetched(release, sae_id, revision=revision, force_download=force_download)
    elif entry.is_embedded:
        _refuse_a_revision(entry, revision)
        folder = entry.folder
    elif entry.conversion_func is not None:
        crosscoder = _converted(
            entry, revision=revision or entry.revision, force_download=force_download
        )
        crosscoder.cfg.device = device
        return crosscoder.to(device)
    else:
        revision = revision or entry.revision
        folder = _fetched(
            entry.repo_id, entry.path, revision=revision, force_download=force_download
        )
    return Crosscoder.load(folder, device=device)


def _revision_of(release: str, revision: str | None) -> tuple[str, str | None]:
    name, at, own = release.partition("@")
    if at and revision not in (None, own):
        raise ValueError(
            f"{release!r} names the revision {own!r}, and revision={revision!r} another one. Give "
            "one of them."
        )
    return (name, own) if at else (release, revision)


def _refuse_a_folder(release: str, sae_id: str) -> None:
    path = Path(release).expanduser()
    here = next((p for p in (path / sae_id, path) if (p / CFG_NAME).is_file()), None)
    is_path_like = release.startswith((".", "/", "~")) or "\\" in release
    if here is not None or is_path_like:
        raise ValueError(
            f"{release!r} is a folder, not a release or a repository of the hub. Load it with "
            f"Crosscoder.load({str(here or path)!r})."
        )


def _refuse_a_revision(entry: Entry, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(
            f"{entry.release} comes with the package and has no revision {revision!r}: leave it "
            "out."
        )


def _fetched(repo_id: str, path: str, *, revision: str | None, force_download: bool) -> Path:
    """The folder in the hub's cache, downloaded where it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    cfg, weights = (in_repository(path, name) for name in (CFG_NAME, WEIGHTS_NAME))
    options = {"revision": revision, "force_download": force_download}
    with explained(repo_id, revision):
        try:
            hf_hub_download(repo_id, cfg, **options)
            _say_a_download(repo_id, weights, **options)
            got = hf_hub_download(repo_id, weights, **options)
            return Path(got).parent
        except RemoteEntryNotFoundError:
            ids = _ids(repo_id, revision)
    raise ValueError(
        f"{repo_id} has no dictionary {path!r}{nearest(path, ids)}: a dictionary is a folder with "
        f"{CFG_NAME} and {WEIGHTS_NAME}, and it has {ids or 'none'}. If it is of another library, "
        "use `tl-crosscoder import`."
    )


def _converted(entry: Entry, *, revision: str | None, force_download: bool) -> Crosscoder:
    """A dictionary in another library's format."""
    from huggingface_hub import hf_hub_download

    name = in_repository(entry.path, WEIGHTS[entry.conversion_func])
    _say_a_download(entry.repo_id, name, revision=revision, force_download=force_download)
    with explained(entry.repo_id, revision):
        hf_hub_download(entry.repo_id, name, revision=revision, force_download=force_download)
    return convert(
        entry.repo_id if entry.path == "." else f"{entry.repo_id}/{entry.path}",
        sites=entry.as_sites(),
        scales=entry.scales,
        revision=revision,
    )


def _say_a_download(repo_id: str, name: str, *, revision: str | None, force_download: bool) -> None:
    from huggingface_hub import try_to_load_from_cache

    is_here = isinstance(try_to_load_from_cache(repo_id, name, revision=revision), str)
    if force_download or not is_here:
        at = "" if revision is None else f" at {revision}"
        tqdm.write(f"Downloading {name} of {repo_id}{at} from the hub.", file=sys.stderr)


def _ids(repo_id: str, revision: str | None) -> list[str]:
    from huggingface_hub import HfApi

    names = set(HfApi().list_repo_files(repo_id, revision=revision))
    folders = {name.rpartition("/")[0] for name in names if name.endswith(CFG_NAME)}
    return sorted(f or "." for f in folders if in_repository(f, WEIGHTS_NAME) in names)
