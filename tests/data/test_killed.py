"""SIGKILL for real, in another process: a cache and a contrastive file go on to the same bytes."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tl_crosscoder.config.inputs import ContrastiveConfig
from tl_crosscoder.data.contrastive import ContrastiveSampler
from tl_crosscoder.run.contrastive import write_contrastive

pytestmark = pytest.mark.slow
OF_CONTRASTIVE = {
    "base": "tl_crosscoder/world-base",
    "adapter": "tl_crosscoder/taboo",
    "n_prompts": 8,
    "max_new_tokens": 6,
    "batch_size": 2,
}
# The process imports once; each child does its work, and is killed in the middle of a batch.
SCRIPT = """
import os, signal, sys
from functools import partial
import torch
from tl_crosscoder import ModelPair, split_documents, tokenize
from tl_crosscoder.data.cache_writer import write_cache
from tl_crosscoder.config.inputs import ContrastiveConfig
from tl_crosscoder.data.contrastive import ContrastiveSampler
from tl_crosscoder import load_documents
from tl_crosscoder.run.contrastive import write_contrastive

folder, n_threads, of_contrastive = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])

def killing(method, after):
    calls = []
    def killed(self, *args, **options):
        calls.append(None)
        if len(calls) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return method(self, *args, **options)
    return killed

def cache():
    pair = ModelPair.from_pretrained(
        "tl_crosscoder/world-base", adapter="tl_crosscoder/taboo",
        hook_name="blocks.1.hook_resid_post",
    )
    documents = split_documents(load_documents("tl_crosscoder/taboo", max_documents=400))
    texts = [tokenize(d, pair.tokenizer, context_size=32) for d in documents]
    # Two batches for the median, two a shard: the third shard is half read.
    type(pair).rows = killing(type(pair).rows, after=7)
    write_cache(
        pair, texts[0][:40], texts[1][:10], f"{folder}/cache", store="float32", shard_tokens=300,
        batch_size=8, show_progress=False,
    )

def contrastive():
    # Two models a batch: in the third, the second one does not write.
    ContrastiveSampler._completions = killing(ContrastiveSampler._completions, after=5)
    write_contrastive(ContrastiveConfig(output=f"{folder}/pairs.jsonl", **of_contrastive))

for work in (cache, contrastive):
    child = os.fork()
    if not child:
        torch.set_num_threads(n_threads)
        work()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A folder with what two killed processes left."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = [folder, torch.get_num_threads(), OF_CONTRASTIVE]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        # Spinning threads beside another busy process are twenty times slower.
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert done.stdout.split() == ["-9", "-9"], done.stderr
    return folder


def bytes_of(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_killed_harvest_goes_on_at_its_shard(
    taboo_pair, small, cache, write, killed, monkeypatch
):
    folder = killed / "cache"
    there = json.loads((folder / "manifest.json").read_text())
    assert not there["is_complete"]
    assert len(there["shards"]) == 2
    (folder / "shards/.00003.safetensors.1.tl_crosscoder.tmp").write_bytes(b"half a shard")
    (folder / "shards/.notes").write_bytes(b"somebody's")
    n_run, rows = [], taboo_pair.rows
    monkeypatch.setattr(
        taboo_pair, "rows", lambda part, **how: (n_run.append(len(part)), rows(part, **how))[1]
    )
    with pytest.raises(ValueError, match="already holds a cache"):
        write(taboo_pair, *small, folder)
    write(taboo_pair, *small, folder, resume=True)
    # 16 contexts for the median, and those of the three shards that were not there.
    assert sum(n_run) == 16 + 50 - 2 * there["shard_contexts"]
    assert bytes_of(folder) == bytes_of(cache.folder) | {"shards/.notes": b"somebody's"}


def test_a_killed_contrastive_file_goes_on_at_its_batch(taboo_pair, killed, tmp_path, monkeypatch):
    """At the record of the last whole batch, whatever the kill left of the next one."""
    monkeypatch.setattr("tl_crosscoder.run.contrastive._load_source", lambda _: taboo_pair)
    sampled, sample = [], ContrastiveSampler.sample
    monkeypatch.setattr(
        ContrastiveSampler, "sample", lambda s, batch: [sampled.append(batch), sample(s, batch)][1]
    )
    undisturbed = ContrastiveConfig(output=str(tmp_path / "pairs.jsonl"), **OF_CONTRASTIVE)
    whole = write_contrastive(undisturbed).read_bytes()
    complete = (tmp_path / "pairs.json").read_bytes()
    path, record_path = killed / "pairs.jsonl", killed / "pairs.json"
    there, record = path.read_bytes(), record_path.read_bytes()
    assert json.loads(record)["n_batches"] == 2
    assert whole.startswith(there)
    for rest in (b"", b'{"input_ids": [1, 2', whole[len(there) : -1]):
        sampled.clear()
        path.write_bytes(there + rest)
        record_path.write_bytes(record)
        write_contrastive(replace(undisturbed, output=str(path)), resume=True)
        assert (path.read_bytes(), record_path.read_bytes()) == (whole, complete)
        assert sampled == [*range(2, json.loads(complete)["n_batches"])]
    sampled.clear()
    write_contrastive(undisturbed, resume=True)
    assert not sampled
