"""Reading: what comes out of a cache is what the models gave, in whatever order it is read."""

import json
import os
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from tl_crosscoder import ActivationCache, ModelPair, TrainConfig, Trainer, files
from tl_crosscoder.data.harvest import harvest, harvest_rows, with_norm_limits
from tl_crosscoder.data.loader import ActivationLoader

HOOK = "blocks.1.hook_resid_post"


def test_rows_are_those_of_the_models_bit_for_bit(taboo_pair, small, cache):
    assert len(cache.shards) == 5  # 50 contexts of 29 kept tokens, about ten a shard
    for given, held in zip(small, (cache.training, cache.held_out), strict=True):
        assert torch.equal(given.tokens, held.tokens)
        live, cached = (
            torch.cat([*harvest_rows(source, text, batch_size=8)])
            for source, text in ((taboo_pair, given), (cache, held))
        )
        assert torch.equal(live, cached)
    assert cache.n_rows == sum(t.n_tokens for t in small)
    assert cache.sites == taboo_pair.sites
    assert cache.tokenizer.get_vocab() == taboo_pair.tokenizer.get_vocab()


def test_vectorised_reads_are_those_of_one_row_at_a_time(cache):
    """The reference: open the shard that holds a row, take the row."""
    index = torch.randint(0, cache.n_rows, (200,), generator=torch.Generator().manual_seed(0))
    expected = []
    for i in index.tolist():
        for shard, stored in zip(cache.shards, cache._stored, strict=True):
            if i < shard.n_rows:
                expected.append(stored["rows"][i])
                break
            i -= shard.n_rows
    assert torch.equal(cache.read(index), torch.stack(expected))
    assert cache.read(torch.arange(0)).shape == (0, 2, 96)
    with pytest.raises(IndexError, match="rows are numbered 0 to"):
        cache.read(torch.tensor([cache.n_rows]))


def test_training_on_a_cache_is_training_on_the_models(taboo_pair, small, cache):  # spec: D2
    config = TrainConfig(
        d_sae=32, n_tokens=64 * 8, batch_size=64, buffer_contexts=16, lr_warmup_steps=3
    )
    live = Trainer(taboo_pair, *small, config=config).fit()
    cached = Trainer(cache, cache.training, cache.held_out, config=config).fit()
    for name, value in live.state_dict().items():
        assert torch.equal(value, cached.state_dict()[name]), name


def test_contexts_of_unequal_lengths_come_back_in_order(taboo_pair, unpacked):
    text, cache = unpacked
    assert len(text.lengths.unique()) > 5
    live = torch.zeros(cache.n_rows, 2, 96)
    for part in harvest(taboo_pair, cache.text, batch_size=4):
        rank = cache.text.mask.flatten().cumsum(0) - 1
        live[rank[part.positions(48)]] = part.rows
    assert torch.equal(cache.read(torch.arange(cache.n_rows)), live)
    # Cut at its longest, a batch computes what padding would: the same tokens in full width.
    full = taboo_pair.activations(text.tokens[:5])[text[:5].mask]
    torch.testing.assert_close(cache.rows(cache.text[:5]), full, atol=1e-4, rtol=1e-4)


def test_sinks_are_dropped_alike_live_and_cached(taboo_pair, small, write, tmp_path):
    text = with_norm_limits(taboo_pair, small[0], multiple=1.3)
    held_out = replace(small[1], norm_limits=text.norm_limits)
    cache = write(taboo_pair, text, held_out, tmp_path / "c")
    live = [*harvest(taboo_pair, text, batch_size=8)]
    assert 0 < cache.training.mask_counts["norm"] == sum(p.text.mask_counts["norm"] for p in live)
    assert torch.equal(torch.cat([p.rows for p in live]), cache.rows(cache.training))
    norms = cache.rows(cache.training).norm(dim=2)
    assert bool((norms <= torch.tensor(text.norm_limits)).all())
    every = torch.cat([*harvest_rows(taboo_pair, small[0], batch_size=8)]).norm(dim=2)
    first = every[: small[0][:16].n_tokens]
    limit = 1.3 * first.median(dim=0).values
    torch.testing.assert_close(torch.tensor(text.norm_limits), limit)
    assert len(norms) == int((every <= limit).all(dim=1).sum())
    batch, _ = next(ActivationLoader(taboo_pair, text, batch_size=32).batches())
    assert bool((batch.norm(dim=2) <= limit).all())


def test_the_difference_of_a_cache_is_that_of_the_models(taboo_pair, small, cache):
    live, cached = taboo_pair.difference(), cache.difference()
    assert live.sites == cached.sites
    rows = torch.cat([*harvest_rows(live, small[1], batch_size=8)])
    assert torch.equal(rows, cached.rows(cache.held_out))
    index = torch.tensor([5, 3])
    x = cache.read(index)
    assert torch.equal(cached.read(index), x[:, 1] - x[:, 0])


def test_sites_of_unequal_width_are_cached_side_by_side(small, write, tmp_path):
    base = "tl_crosscoder/world-base"
    sites = ModelPair.from_pretrained(base, hook_name=[HOOK, "blocks.0.mlp.hook_post"])
    cache = write(sites, *small, tmp_path / "c", store="int8")
    live = torch.cat([*harvest_rows(sites, small[1], batch_size=8)])
    torch.testing.assert_close(cache.rows(cache.held_out), live, atol=0.05, rtol=0)
    assert "difference" not in cache.manifest["statistics"]
    assert [*cache.manifest["storage_error"]] == [site.name for site in sites.sites]


def test_some_of_the_tokens_of_some_contexts_but_no_dropped_one(cache):
    part = cache.text[torch.tensor([7, 3])]
    odd = replace(part, dropped=part.dropped.clone())
    odd.dropped[:, ::2] = 2
    keep = (part.mask.nonzero()[:, 1] % 2) == 1
    assert torch.equal(cache.rows(odd), cache.rows(part)[keep])
    with pytest.raises(ValueError, match="of these tokens were dropped when"):
        cache.rows(replace(part, dropped=torch.zeros_like(part.dropped)))


def test_many_shards_need_few_open_files(cache):
    """Two files at a time: far fewer than shards."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_ = {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208
    third_free = [n for n in range(len(open_) + 3) if n not in open_][2]
    resource.setrlimit(resource.RLIMIT_NOFILE, (third_free, before[1]))
    try:
        again = ActivationCache(cache.folder)
        rows = again.read(torch.arange(cache.n_rows))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert torch.equal(rows, cache.read(torch.arange(cache.n_rows)))


# --- what is wrong is named -----------------------------------------------------------------------


@pytest.fixture
def copied(cache, tmp_path):
    shutil.copytree(cache.folder, tmp_path / "copy")
    return tmp_path / "copy"


def flip_last_byte(path):
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def belong_to_another(path):
    """As large, and of another harvest."""
    owner = json.loads((path.parents[1] / "manifest.json").read_text())["cache_id"]
    files.write_tensors(path, load_file(path), metadata={"cache": owner[::-1]})


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (flip_last_byte, ValueError, "is damaged: its sha256"),
        (belong_to_another, ValueError, "belongs to another cache"),
        (lambda p: p.write_bytes(p.read_bytes()[:-7]), ValueError, "is damaged: it has .* bytes"),
        (lambda p: p.unlink(), FileNotFoundError, "is missing"),
    ],
)
def test_a_shard_that_is_not_what_was_written_is_named(copied, damage, error, message):
    damage(copied / "shards/00001.safetensors")
    with pytest.raises(error, match=rf"00001.safetensors {message}"):
        ActivationCache(copied)
    if damage is flip_last_byte:  # what only the sha256 tells
        ActivationCache(copied, verify=False)
        return
    with pytest.raises(error, match=rf"00001.safetensors {message}"):
        ActivationCache(copied, verify=False)


def test_values_that_are_no_numbers_are_named_when_a_cache_is_opened(copied):
    """Also those whose squares are none: 1e20 in float32. Without verification they are in what is
    measured."""
    path, manifest = copied / "shards/00004.safetensors", copied / "manifest.json"
    content, tensors = json.loads(manifest.read_text()), load_file(path)
    for value in (torch.nan, -torch.inf, 1e20):
        tensors["rows"][0, 1, 5] = value
        files.write_tensors(path, tensors, metadata={"cache": content["cache_id"]})
        content["shards"][4]["sha256"] = files.sha256(path)
        manifest.write_text(json.dumps(content))
        wanted = (
            r"of [\d,]+ tokens the activation, or its square, is NaN or infinite for 1 at 'fine"
        )
        with pytest.raises(ValueError, match=wanted):
            ActivationCache(copied)
        cache = ActivationCache(copied, verify=False)
        with pytest.raises(ValueError, match=wanted):
            list(harvest_rows(cache, cache.text))
    tensors["rows"][0, 1, 5] = 1e16  # large, and a number
    files.write_tensors(path, tensors, metadata={"cache": content["cache_id"]})
    content["shards"][4]["sha256"] = files.sha256(path)
    manifest.write_text(json.dumps(content))
    assert ActivationCache(copied).n_rows


def test_what_is_not_a_cache_or_not_complete_is_refused(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not an activation cache"):
        ActivationCache(tmp_path)
    path = copied / "manifest.json"
    content = path.read_text()
    there = json.loads(content)
    for change, message in (
        ({"sites": there["sites"][::-1]}, "has been changed since it was written"),
        ({"shards": there["shards"][::-1]}, "names its shards in another order"),
        ({"is_complete": False}, "is not complete: it has 5 of 5 shards"),
        ({"format": 99}, "has format 99"),
    ):
        path.write_text(json.dumps(there | change))
        with pytest.raises(ValueError, match=message):
            ActivationCache(copied)
    path.write_text(content)
    flip_last_byte(copied / "text.safetensors")
    with pytest.raises(ValueError, match=r"text.safetensors is missing or damaged"):
        _ = ActivationCache(copied).text
