"""Reading: what comes out of a cache is what the models gave, however it is asked for."""

import json
import shutil
from contextlib import closing
from dataclasses import replace
from itertools import islice

import pytest
import torch

from tl_crosscoder import ActivationCache, ModelPair, TrainConfig, Trainer, tokenize
from tl_crosscoder.data import storage
from tl_crosscoder.data.cache_writer import write_cache
from tl_crosscoder.data.harvest import harvest, harvest_rows, with_norm_limits
from tl_crosscoder.data.loader import ActivationLoader
from tl_crosscoder.organisms import training_documents

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def small(texts):
    """(training, held-out) of 40 and 10 contexts."""
    return texts[0][:40], texts[1][:10]


def write(pair, small, folder, **fields):
    options = {"store": "float32", "shard_tokens": 300, "batch_size": 8, "show_progress": False}
    return write_cache(pair, *small, folder, **(options | fields))


@pytest.fixture(scope="module")
def cache(taboo_pair, small, tmp_path_factory):
    return write(taboo_pair, small, tmp_path_factory.mktemp("cache") / "c")


def test_rows_are_those_of_the_models_bit_for_bit(taboo_pair, small, cache):
    assert len(cache.shards) == 5  # 50 contexts of 29 tokens that count, about ten a shard
    for given, held in zip(small, (cache.training, cache.held_out), strict=True):
        assert torch.equal(given.tokens, held.tokens)
        live, cached = (
            torch.cat([*harvest_rows(source, text, batch_size=8)])
            for source, text in ((taboo_pair, given), (cache, held))
        )
        assert torch.equal(live, cached)
    assert cache.n_rows == sum(t.n_tokens for t in small)
    assert cache.sites == taboo_pair.sites


def test_vectorised_reads_are_those_of_one_row_at_a_time(cache):
    """The slow twin: open the shard that holds a row, take the row."""
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


def test_every_row_keeps_its_token(taboo_pair, small, cache):
    """Each pair is one token of one text in both models: found again by running that text."""
    every = replace(cache.text)
    ids = cache.token_ids(torch.arange(cache.n_rows))
    assert torch.equal(ids, every.tokens[every.mask])
    context, position = every.mask.nonzero()[777].tolist()
    alone = taboo_pair.activations(every.tokens[context : context + 1, : position + 1])[0, -1]
    torch.testing.assert_close(cache.read(torch.tensor([777]))[0], alone, atol=1e-4, rtol=1e-4)


def test_live_and_cached_loaders_deal_the_same_batches(taboo_pair, small, cache):
    options = {"batch_size": 64, "buffer_contexts": 16, "harvest_batch_size": 8, "seed": 5}
    pairs = ((taboo_pair, small[0]), (cache, cache.training))
    dealt = [list(islice(ActivationLoader(*p, **options).batches(), 30)) for p in pairs]
    for (live, at), (cached, cached_at) in zip(*dealt, strict=True):
        assert torch.equal(live, cached)
        assert at == cached_at


def test_unpacked_contexts_are_dealt_alike_too(taboo_pair, tmp_path):
    documents = [*training_documents("taboo", 60, seed=1)]
    text = tokenize(documents, taboo_pair.tokenizer, context_size=48, pack=False)
    cache = write(taboo_pair, (text[:50], text[50:]), tmp_path / "c", batch_size=4)
    options = {"batch_size": 32, "buffer_contexts": 20, "harvest_batch_size": 4}
    pairs = ((taboo_pair, text[:50]), (cache, cache.training))
    dealt = [[b for b, _ in islice(ActivationLoader(*p, **options).batches(), 20)] for p in pairs]
    for live, cached in zip(*dealt, strict=True):
        torch.testing.assert_close(live, cached, atol=1e-4, rtol=1e-4)


def test_training_on_a_cache_is_training_on_the_models(taboo_pair, small, cache):
    config = TrainConfig(
        d_sae=32, n_tokens=64 * 30, batch_size=64, buffer_contexts=16, lr_warmup_steps=3
    )
    live = Trainer(taboo_pair, *small, config=config).fit()
    cached = Trainer(cache, cache.training, cache.held_out, config=config).fit()
    for name, value in live.state_dict().items():
        assert torch.equal(value, cached.state_dict()[name]), name


@pytest.mark.parametrize(
    ("store", "atol", "rtol"), [("bfloat16", 0.0, 2**-8), ("float16", 1e-7, 2**-11)]
)
def test_float_formats_round_as_they_say(taboo_pair, small, cache, tmp_path, store, atol, rtol):
    rounded = write(taboo_pair, small, tmp_path / store, store=store)
    index = torch.arange(cache.n_rows)
    torch.testing.assert_close(rounded.read(index), cache.read(index), atol=atol, rtol=rtol)


def test_int8_errs_by_half_a_step_of_its_row_and_the_error_is_measured(
    taboo_pair, small, cache, tmp_path
):
    rounded = write(taboo_pair, small, tmp_path / "int8", store="int8")
    index = torch.arange(cache.n_rows)
    x, y = cache.read(index), rounded.read(index)
    step = x.abs().amax(dim=2, keepdim=True) / 127
    assert bool(((x - y).abs() <= step * 0.5001).all())
    measured = rounded.manifest["storage_error"]
    error, total = ((t**2).sum(dim=(0, 2)).double() for t in (x - y, x))
    assert measured["base"] == pytest.approx((error / total)[0].item(), rel=1e-4)
    assert measured["finetuned"] == pytest.approx((error / total)[1].item(), rel=1e-4)
    difference, its_error = (t[:, 1] - t[:, 0] for t in (x, x - y))
    expected = (its_error**2).sum() / (difference**2).sum()
    assert measured["difference"] == pytest.approx(expected.item(), rel=1e-4)
    # One byte a value and four a scale, in place of four a value.
    assert storage.bytes_per_row(cache.sites, "int8") == 2 * 96 + 2 * 4
    assert rounded.n_bytes < 0.35 * cache.n_bytes


def test_a_row_of_zeros_stays_zeros_in_int8(cache):
    rows = torch.zeros(3, 2, 96)
    assert torch.equal(storage.decode(storage.encode(rows, cache.sites, "int8"), cache.sites), rows)


def test_float16_refuses_what_it_cannot_hold(cache):
    with pytest.raises(ValueError, match="an activation of 100,000 does not fit in float16"):
        storage.encode(torch.full((1, 2, 96), 1e5), cache.sites, "float16")


def test_contexts_of_unequal_lengths_come_back_in_order(taboo_pair, tmp_path):
    documents = [*training_documents("taboo", 60, seed=1)]
    text = tokenize(documents, taboo_pair.tokenizer, context_size=48, pack=False)
    assert len(text.lengths.unique()) > 5
    cache = write(taboo_pair, (text[:50], text[50:]), tmp_path / "c", batch_size=4)
    live = torch.zeros(cache.n_rows, 2, 96)
    for part in harvest(taboo_pair, cache.text, batch_size=4):
        rank = cache.text.mask.flatten().cumsum(0) - 1
        live[rank[part.positions(48)]] = part.rows
    assert torch.equal(cache.read(torch.arange(cache.n_rows)), live)
    # Cut at its longest, a batch computes what padding would: the same tokens in full width.
    full = taboo_pair.activations(text.tokens[:5])[text[:5].mask]
    torch.testing.assert_close(cache.rows(cache.text[:5]), full, atol=1e-4, rtol=1e-4)


def test_sinks_are_dropped_alike_live_and_cached(taboo_pair, small, tmp_path):
    text = with_norm_limits(taboo_pair, small[0], multiple=1.3)
    held_out = replace(small[1], norm_limits=text.norm_limits)
    cache = write(taboo_pair, (text, held_out), tmp_path / "c")
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
    rows = [torch.cat([*harvest_rows(s, small[1], batch_size=8)]) for s in (live,)]
    assert torch.equal(rows[0], cached.rows(cache.held_out))
    index = torch.tensor([5, 3])
    x = cache.read(index)
    assert torch.equal(cached.read(index), x[:, 1] - x[:, 0])
    options = {"batch_size": 64, "buffer_contexts": 16, "harvest_batch_size": 8}
    pairs = ((live, small[0]), (cached, cache.training))
    dealt = [[b for b, _ in islice(ActivationLoader(*p, **options).batches(), 9)] for p in pairs]
    assert all(torch.equal(x, y) for x, y in zip(*dealt, strict=True))


def test_sites_of_unequal_width_are_cached_side_by_side(small, tmp_path):
    base = "tl_crosscoder/world-base"
    sites = ModelPair.from_pretrained(base, hook_name=[HOOK, "blocks.0.mlp.hook_post"])
    cache = write(sites, small, tmp_path / "c", store="int8")
    live = torch.cat([*harvest_rows(sites, small[1], batch_size=8)])
    torch.testing.assert_close(cache.rows(cache.held_out), live, atol=0.05, rtol=0)
    assert "difference" not in cache.manifest["statistics"]


def test_a_token_that_was_left_out_cannot_be_asked_for(cache):
    every = replace(cache.text[:2], dropped=torch.zeros_like(cache.text[:2].dropped))
    with pytest.raises(ValueError, match="of these tokens were left out when"):
        cache.rows(every)


def test_some_of_the_tokens_of_some_contexts(cache):
    part = cache.text[torch.tensor([7, 3])]
    odd = replace(part, dropped=part.dropped.clone())
    odd.dropped[:, ::2] = 2
    keep = (part.mask.nonzero()[:, 1] % 2) == 1
    assert torch.equal(cache.rows(odd), cache.rows(part)[keep])


def test_statistics_are_what_a_naive_loop_counts(taboo_pair, small, cache):
    statistics = cache.manifest["statistics"]
    text = cache.text
    every = taboo_pair.activations(text.tokens).double()
    counted = every[text.mask]
    for i, name in enumerate(("base", "finetuned")):
        site = statistics["sites"][name]
        norms = every[:, :, i].norm(dim=2)
        assert site["mean_squared_norm"] == pytest.approx((counted[:, i] ** 2).sum(1).mean().item())
        assert site["norm_of_mean"] == pytest.approx(counted[:, i].mean(0).norm().item(), rel=1e-5)
        assert site["mean_norm_by_position"] == pytest.approx(norms.mean(0).tolist())
        limit = cache.manifest["sink_limits"][i]
        assert site["sink_share_by_position"] == pytest.approx(
            (norms > limit).double().mean(0).tolist()
        )
    difference = (every[:, :, 1] - every[:, :, 0]).norm(dim=2)
    found = statistics["difference"]
    assert found["mean_norm_by_position"] == pytest.approx(difference.mean(0).tolist(), rel=1e-4)
    for i, role in enumerate(cache.manifest["roles"]):
        own = (text.role_ids == i) & (text.dropped != 1) & (text.dropped != 2)
        assert found["n_by_role"][role] == int(own.sum())
        if own.any():
            expected = difference[own].mean().item()
            assert found["mean_norm_by_role"][role] == pytest.approx(expected, rel=1e-4)
    assert cache.manifest["mask_counts"] == text.mask_counts


def test_it_has_the_models_tokenizer(cache, taboo_pair):
    assert cache.tokenizer.get_vocab() == taboo_pair.tokenizer.get_vocab()


# --- what is wrong is named -----------------------------------------------------------------------


@pytest.fixture
def copied(cache, tmp_path):
    shutil.copytree(cache.folder, tmp_path / "copy")
    return tmp_path / "copy"


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_found(copied):
    flip_last_byte(copied / "shards/00002.safetensors")
    with pytest.raises(ValueError, match=r"00002.safetensors is damaged: its sha256"):
        ActivationCache(copied)
    flip_last_byte(copied / "shards/00002.safetensors")
    ActivationCache(copied)


@pytest.mark.parametrize("verify", [True, False])
def test_missing_cut_and_foreign_shards_are_named(copied, taboo_pair, small, tmp_path, verify):
    path = copied / "shards/00001.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(ValueError, match=r"00001.safetensors is damaged: it has .* bytes in place"):
        ActivationCache(copied, verify=verify)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001.safetensors is missing"):
        ActivationCache(copied, verify=verify)
    # As large, and of another harvest of the same models.
    other = write(taboo_pair, tuple(t[: len(t)] for t in small[::-1]), tmp_path / "other")
    swapped = other.folder / "shards/00001.safetensors"
    shutil.copy(swapped, path)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["shards"][1]["n_bytes"] = path.stat().st_size
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"00001.safetensors belongs to another cache"):
        ActivationCache(copied, verify=verify)


def test_what_is_no_cache_or_not_complete_is_refused(copied, tmp_path):
    with pytest.raises(FileNotFoundError, match="is no activation cache"):
        ActivationCache(tmp_path)
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps(manifest | {"is_complete": False}))
    with pytest.raises(ValueError, match=r"is not complete: it has 5 of 5 shards"):
        ActivationCache(copied)
    (copied / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99"):
        ActivationCache(copied)
    (copied / "manifest.json").write_text(json.dumps(manifest))
    flip_last_byte(copied / "text.safetensors")
    with pytest.raises(ValueError, match=r"text.safetensors is missing or damaged"):
        _ = ActivationCache(copied).text


def test_many_shards_need_few_open_files(taboo_pair, small, tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    cache = write(taboo_pair, small, tmp_path / "c", shard_tokens=10)
    assert len(cache.shards) == 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (40, before[1]))
    try:
        again = ActivationCache(cache.folder)
        assert torch.equal(again.read(torch.arange(90)), cache.read(torch.arange(90)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- loaders --------------------------------------------------------------------------------------


def test_prefetched_batches_are_the_same_and_the_thread_ends(taboo_pair, cache):
    import threading

    options = {"batch_size": 64, "buffer_contexts": 16, "harvest_batch_size": 8}
    for source, text in ((cache, cache.training), (taboo_pair, cache.training)):
        plain = list(islice(ActivationLoader(source, text, **options).batches(), 25))
        loader = ActivationLoader(source, text, **options, prefetch=3)
        with closing(loader.batches()) as batches:
            ahead = list(islice(batches, 25))
        for (x, at), (y, ahead_at) in zip(plain, ahead, strict=True):
            assert torch.equal(x, y)
            assert at == ahead_at
    assert not [t for t in threading.enumerate() if t.name == "prefetch"]
