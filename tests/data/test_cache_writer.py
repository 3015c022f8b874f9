"""Writing: out of space, in the wrong folder, resumed. Nothing is lost, nothing is mixed up."""

import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tl_crosscoder import ActivationCache, files


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@contextmanager
def limited_file(folder, shard_bytes):
    """A quota in small: this process may not write files as large as a shard."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shard_bytes - 1, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def full_disk(folder, shard_bytes):
    """A file system of a few shards, enlarged at the end."""
    subprocess.run(["mount", "-o", f"remount,size={3 * shard_bytes}", str(folder)], check=True)
    yield
    subprocess.run(["mount", "-o", f"remount,size={90 * shard_bytes}", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path):
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("needs to mount")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=False)


@pytest.mark.parametrize(
    ("where", "without_space"), [("tmp_path", limited_file), ("disk", full_disk)]
)
def test_a_full_disk_is_said_and_resumed_when_there_is_space(
    taboo_pair, small, cache, write, request, monkeypatch, where, without_space
):
    """Really full; the check beforehand is blinded to reach the write."""
    root = request.getfixturevalue(where)
    with without_space(root, cache.shards[0].n_bytes):
        if where == "disk":
            with pytest.raises(ValueError, match=r"but the disk of .* has only"):
                write(taboo_pair, *small, root / "c")
            assert list((root / "c").glob("shards/*")) == []
        monkeypatch.setattr(files, "free_bytes", lambda _: 10**12)
        with pytest.raises(ValueError, match=r"is full after \d of 5.*continue with resume"):
            write(taboo_pair, *small, root / "c", resume=True)
    assert not list(root.rglob("*.tmp"))
    manifest = json.loads((root / "c/manifest.json").read_text())
    assert len(manifest["shards"]) == (2 if where == "disk" else 0)
    assert manifest["cache_id"] == cache.cache_id
    write(taboo_pair, *small, root / "c", resume=True)
    assert bytes_of(root / "c") == bytes_of(cache.folder)


def test_the_size_is_said_and_about_right(taboo_pair, small, cache, write, tmp_path, monkeypatch):
    # Two sites of 96 in float32, and 8 bytes a position.
    n_bytes = sum(t.n_tokens * 2 * 96 * 4 + 8 * t.tokens.numel() for t in small)
    actual = sum(len(content) for content in bytes_of(cache.folder).values())
    # Sums and headers of small shards are the rest.
    assert n_bytes < actual < 1.1 * n_bytes
    monkeypatch.setattr(files, "free_bytes", lambda _: n_bytes - 1)
    said = rf"needs .* GB \({cache.n_rows:,} tokens x 768 bytes = 0.* GB free.*harvest fewer tokens"
    with pytest.raises(ValueError, match=said):
        write(taboo_pair, *small, tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"store": "int8"}, r"store \('float32' there, 'int8' now\)"),
        ({"shard_tokens": 500}, "shard_contexts"),
        ({"source": "null_pair"}, r"sites .*taboo"),
        ({"training": 1, "held_out": 0}, "n_training_contexts"),
    ],
)
def test_another_harvest_is_not_continued(taboo_pair, small, cache, write, request, change, named):
    before, change = bytes_of(cache.folder), dict(change)
    source = request.getfixturevalue(change.pop("source", "taboo_pair"))
    texts = small[change.pop("training", 0)], small[change.pop("held_out", 1)]
    with pytest.raises(ValueError, match=rf"holds another cache: .*{named}"):
        write(source, *texts, cache.folder, **change, resume=True)
    with pytest.raises(ValueError, match="already holds a cache"):
        write(source, *texts, cache.folder, **change)
    assert bytes_of(cache.folder) == before


def test_a_damaged_shard_stops_a_resume(taboo_pair, small, cache, write, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(cache.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"is_complete": False, "shards": manifest["shards"][:4]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    path = folder / "shards/00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"00003.safetensors is damaged"):
        write(taboo_pair, *small, folder, resume=True)


def test_a_complete_cache_is_not_written_again(taboo_pair, small, cache, write):
    before = {p: p.stat().st_mtime_ns for p in cache.folder.rglob("*.safetensors")}
    again = write(taboo_pair, *small, cache.folder, resume=True)
    assert isinstance(again, ActivationCache)
    assert before == {p: p.stat().st_mtime_ns for p in cache.folder.rglob("*.safetensors")}


def test_a_folder_with_something_else_is_left_alone(taboo_pair, small, write, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not an empty folder and holds no cache"):
        write(taboo_pair, *small, tmp_path)
    with pytest.raises(ValueError, match="both need the same"):
        write(taboo_pair, small[0], small[1].cut(16), tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_several_processes_write_the_bytes_of_one(tmp_path):
    harvest = [
        sys.executable,
        "-m",
        "tl_crosscoder",
        "harvest",
        "--base",
        "tl_crosscoder/world-base",
    ]
    harvest += ["--adapter", "tl_crosscoder/taboo", "--text", "tl_crosscoder/taboo"]
    harvest += ["--hook-name", "blocks.1.hook_resid_post", "--max-documents", "200"]
    harvest += ["--shard-tokens", "1500"]
    printed = []
    for n in (1, 2):
        command = [*harvest, "--output", f"cache-{n}", "--workers", str(n)]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        printed.append(run.stdout)
    one, two = (bytes_of(tmp_path / f"cache-{n}") for n in (1, 2))
    manifests = [json.loads(found.pop("manifest.json")) for found in (one, two)]
    assert len(manifests[0]["shards"]) > 4
    assert [m["made_with"].pop("output") for m in manifests] == ["cache-1", "cache-2"]
    assert manifests[0] == manifests[1]
    assert one == two
    assert printed[0].replace("cache-1", "cache-2") == printed[1]  # by one of them
