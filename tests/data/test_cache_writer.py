"""Writing: killed, out of room, in the wrong folder. Nothing is lost, nothing is mixed up."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tl_crosscoder import ActivationCache, files
from tl_crosscoder.data.cache_writer import CacheSize, write_cache

SCRIPT = """
import resource, sys, time
from tl_crosscoder import ModelPair, split_documents, tokenize
from tl_crosscoder.data.cache_writer import write_cache
from tl_crosscoder.organisms import training_documents
import torch
torch.set_num_threads(int(sys.argv[4]))
pair = ModelPair.from_pretrained(
    "tl_crosscoder/world-base", adapter="tl_crosscoder/taboo", hook_name=sys.argv[2]
)
documents = split_documents(training_documents("taboo", 400, seed=0))
texts = [tokenize(d, pair.tokenizer, context_size=32) for d in documents]
limit = int(sys.argv[3])
if limit:
    # A quota in small: no file of this process grows beyond so many bytes.
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
print("ready", flush=True)
write_cache(pair, *texts, sys.argv[1], store="float32", shard_tokens=300, batch_size=8)
"""
HOOK = "blocks.1.hook_resid_post"
OPTIONS = {"store": "float32", "shard_tokens": 300, "batch_size": 8, "show_progress": False}


def start(folder, *, limit=0):
    arguments = [folder, HOOK, limit, torch.get_num_threads()]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def unbroken(taboo_pair, texts, tmp_path_factory):
    return write_cache(taboo_pair, *texts, tmp_path_factory.mktemp("unbroken") / "c", **OPTIONS)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_killed_harvest_goes_on_at_its_shard(taboo_pair, texts, unbroken, tmp_path, monkeypatch):
    """For real: another process, killed -9 once it has some shards."""
    folder = tmp_path / "c"
    process = start(folder)
    while len(list(folder.glob("shards/0*"))) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    there = json.loads((folder / "manifest.json").read_text())
    assert not there["is_complete"]
    n_done = len(there["shards"])
    assert 2 <= n_done < there["n_shards"]
    (folder / "shards/.00003.safetensors.1.tmp").write_bytes(b"half a shard")
    ran = []
    rows = taboo_pair.rows
    monkeypatch.setattr(
        taboo_pair, "rows", lambda part, **how: (ran.append(len(part)), rows(part, **how))[1]
    )
    with pytest.raises(ValueError, match="already holds a cache"):
        write_cache(taboo_pair, *texts, folder, **OPTIONS)
    resumed = write_cache(taboo_pair, *texts, folder, **OPTIONS, resume=True)
    n_contexts = sum(map(len, texts))
    n_median = 16
    assert sum(ran) == n_median + n_contexts - n_done * there["shard_contexts"]
    assert bytes_of(folder) == bytes_of(unbroken.folder)
    assert torch.equal(resumed.text.tokens, unbroken.text.tokens)


def test_without_room_it_says_so_and_goes_on_when_there_is(taboo_pair, texts, unbroken, tmp_path):
    """A writer that fails at byte n: the process may not write files as large as a shard."""
    folder = tmp_path / "c"
    size = max(s.n_bytes for s in unbroken.shards)
    process = start(folder, limit=size - 1)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "is full after" in errors
    assert "continue with resume (--resume)" in errors
    assert not list(folder.rglob("*.tmp"))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["shards"]) < manifest["n_shards"]
    write_cache(taboo_pair, *texts, folder, **OPTIONS, resume=True)
    assert bytes_of(folder) == bytes_of(unbroken.folder)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="needs to mount")
def test_a_full_disk_for_real(taboo_pair, texts, unbroken, tmp_path, monkeypatch):
    """A file system of a few shards; the check beforehand is blinded to reach the write."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = 4 * unbroken.shards[0].n_bytes
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(ValueError, match=r"but the disk of .* has only"):
            write_cache(taboo_pair, *texts, disk / "c", **OPTIONS)
        assert list((disk / "c").glob("shards/*")) == []
        monkeypatch.setattr(files, "free_bytes", lambda _: 10**12)
        with pytest.raises(ValueError, match=r"is full after [1-9]\d* of"):
            write_cache(taboo_pair, *texts, disk / "c", **OPTIONS, resume=True)
        cache_there = json.loads((disk / "c/manifest.json").read_text())
        subprocess.run(["mount", "-o", f"remount,size={30 * size}", str(disk)], check=True)
        write_cache(taboo_pair, *texts, disk / "c", **OPTIONS, resume=True)
        assert bytes_of(disk / "c") == bytes_of(unbroken.folder)
        assert cache_there["cache_id"] == unbroken.cache_id
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_the_size_is_told_and_about_right(taboo_pair, texts, unbroken, tmp_path, monkeypatch):
    size = CacheSize.of(taboo_pair, texts[0], "float32")
    assert size.bytes_per_row == 2 * 96 * 4
    assert str(size).startswith(f"{texts[0].n_tokens:,} tokens x 768 bytes = 0.0")
    joined = sum(t.n_tokens * 768 + 8 * t.tokens.numel() for t in texts)
    actual = sum(len(content) for content in bytes_of(unbroken.folder).values())
    # Sums and headers of 32 small shards are the rest.
    assert joined < actual < 1.2 * joined
    monkeypatch.setattr(files, "free_bytes", lambda _: joined - 1)
    with pytest.raises(ValueError, match=r"the cache needs .* GB .* GB free.*harvest fewer tokens"):
        write_cache(taboo_pair, *texts, tmp_path / "c", **OPTIONS)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"store": "int8"}, r"store \('float32' there, 'int8' now\)"),
        ({"shard_tokens": 500}, "shard_contexts"),
    ],
)
def test_another_harvest_is_not_continued(taboo_pair, texts, unbroken, change, named):
    before = bytes_of(unbroken.folder)
    with pytest.raises(ValueError, match=rf"holds another cache: .*{named}"):
        write_cache(taboo_pair, *texts, unbroken.folder, **(OPTIONS | change), resume=True)
    assert bytes_of(unbroken.folder) == before


def test_other_models_and_other_text_do_not_continue_it(taboo_pair, null_pair, texts, unbroken):
    with pytest.raises(ValueError, match=r"holds another cache: .*sites .*taboo"):
        write_cache(null_pair, *texts, unbroken.folder, **OPTIONS, resume=True)
    with pytest.raises(ValueError, match=r"holds another cache: .*n_training_contexts"):
        write_cache(taboo_pair, *texts[::-1], unbroken.folder, **OPTIONS, resume=True)


def test_a_damaged_shard_stops_a_resume(taboo_pair, texts, unbroken, tmp_path):
    shutil.copytree(unbroken.folder, tmp_path / "c")
    manifest = json.loads((tmp_path / "c/manifest.json").read_text())
    manifest |= {"is_complete": False, "shards": manifest["shards"][:5]}
    (tmp_path / "c/manifest.json").write_text(json.dumps(manifest))
    path = tmp_path / "c/shards/00003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ValueError, match=r"00003.safetensors is damaged"):
        write_cache(taboo_pair, *texts, tmp_path / "c", **OPTIONS, resume=True)


def test_a_complete_cache_is_not_written_again(taboo_pair, texts, unbroken):
    before = {p: p.stat().st_mtime_ns for p in unbroken.folder.rglob("*.safetensors")}
    again = write_cache(taboo_pair, *texts, unbroken.folder, **OPTIONS, resume=True)
    assert isinstance(again, ActivationCache)
    assert before == {p: p.stat().st_mtime_ns for p in unbroken.folder.rglob("*.safetensors")}


def test_a_folder_with_something_else_is_left_alone(taboo_pair, texts, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not an empty folder and holds no cache"):
        write_cache(taboo_pair, *texts, tmp_path, **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_contexts_of_two_sizes_are_refused(taboo_pair, texts, tmp_path):
    with pytest.raises(ValueError, match="both need the same"):
        write_cache(taboo_pair, texts[0], texts[1].cut(16), tmp_path / "c", **OPTIONS)
