"""A cache at an address is the same cache: its rows, its batches, and its refusals."""

import fsspec
import pytest
import torch

from tl_crosscoder import ActivationCache, TrainConfig, Trainer
from tl_crosscoder.data.harvest import with_norm_limits
from tl_crosscoder.data.remote import is_remote

ADDRESS = "memory://bucket/cache"


@pytest.fixture
def uploaded():
    """Puts a folder at an address, and cleans up."""
    fs = fsspec.filesystem("memory")

    def put(folder):
        fs.put(str(folder), ADDRESS, recursive=True)
        return fs

    yield put
    fs.rm("/bucket", recursive=True)


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def stored(request, taboo_pair, small, write, tmp_path):
    return write(taboo_pair, *small, tmp_path / "c", store=request.param)


def test_rows_are_those_of_the_folder_in_any_order(stored, uploaded):
    uploaded(stored.folder)
    remote = ActivationCache(ADDRESS)
    assert remote.n_rows == stored.n_rows
    assert torch.equal(remote.text.tokens, stored.text.tokens)
    everything = torch.arange(stored.n_rows)
    shuffled = everything[torch.randperm(stored.n_rows, generator=torch.manual_seed(0))]
    for index in (everything, shuffled, torch.tensor([5, 5, 0, 299, 300, 7]), everything[:0]):
        assert torch.equal(remote.read(index), stored.read(index))
    contexts = stored.training[[9, 2, 40 - 1]]
    assert torch.equal(remote.rows(contexts), stored.rows(contexts))
    difference, expected = remote.difference(), stored.difference()
    assert torch.equal(difference.read(shuffled), expected.read(shuffled))


def test_training_reads_ranges_of_contexts_and_gives_the_same_bits(cache, uploaded, monkeypatch):
    fs, asked = uploaded(cache.folder), []
    read = type(fs).cat_ranges

    def counted(self, paths, *args, **kwargs):
        asked.append(len(paths))
        return read(self, paths, *args, **kwargs)

    monkeypatch.setattr(type(fs), "cat_ranges", counted)
    remote = ActivationCache(ADDRESS)
    assert asked == [len(cache.shards)]  # their headers
    asked.clear()
    config = TrainConfig(
        d_sae=32, n_tokens=64 * 8, batch_size=64, buffer_contexts=16, lr_warmup_steps=3,
        harvest_batch_size=16,
    )  # fmt: skip
    one = Trainer(cache, cache.training, cache.held_out, config=config).fit()
    assert not asked
    other = Trainer(remote, remote.training, remote.held_out, config=config).fit()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert max(asked) <= 16  # contexts, not rows


def test_tokens_that_the_models_dropped_stay_dropped(taboo_pair, small, write, tmp_path, uploaded):
    text = with_norm_limits(taboo_pair, small[0], multiple=1.3)
    cache = write(taboo_pair, text, small[1], tmp_path / "c")
    assert cache.training.mask_counts["norm"]
    uploaded(cache.folder)
    assert torch.equal(ActivationCache(ADDRESS).text.dropped, cache.text.dropped)


def test_a_run_names_an_address(cache, uploaded, tmp_path):
    from tl_crosscoder.config.training import RunConfig
    from tl_crosscoder.run.training import train

    uploaded(cache.folder)
    run = train(
        RunConfig(
            cache=ADDRESS, output=str(tmp_path / "run"), d_sae=32, n_tokens=512, batch_size=64
        )
    )
    assert run.record["training"]["cache"] == ADDRESS
    assert run.measure().reconstruction == run.measurement().reconstruction


@pytest.mark.parametrize(
    ("damage", "verify", "message"),
    [
        (lambda fs: fs.rm("/bucket/cache/shards/00001.safetensors"), None, "is missing"),
        (lambda fs: fs.pipe("/bucket/cache/shards/00001.safetensors", b"short"), None, "5 bytes"),
        (lambda fs: fs.pipe("/bucket/cache/text.safetensors", b"else"), None, "text.*is damaged"),
        (lambda fs: changed(fs, 0, b"\xff" * 7), None, "header"),
        (lambda fs: changed(fs, -1, b"?"), True, "its sha256"),
        (lambda fs: fs.rm("/bucket/cache/manifest.json"), None, "is not an activation cache"),
        (lambda fs: fs.pipe("/bucket/cache/manifest.json", b"{}"), None, "has format None"),
        (lambda fs: fs.pipe("/bucket/cache/manifest.json", b"<html>"), None, "is not JSON"),
    ],
    ids=["missing", "short", "text", "header", "sha256", "nothing", "version", "page"],
)
def test_what_is_not_the_cache_is_named(cache, uploaded, damage, verify, message):
    fs = uploaded(cache.folder)
    assert ActivationCache(ADDRESS, verify=True).n_rows == cache.n_rows
    damage(fs)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        _ = ActivationCache(ADDRESS, verify=verify).text


def changed(fs, at: int, content: bytes) -> None:
    path = "/bucket/cache/shards/00002.safetensors"
    whole = bytearray(fs.cat_file(path))
    at %= len(whole)
    whole[at : at + len(content)] = content
    fs.pipe(path, bytes(whole))


def test_an_address_of_no_file_system_is_refused(cache):
    assert is_remote("s3://bucket/cache")
    assert not is_remote(cache.folder)
    with pytest.raises(ValueError, match="nowhere://bucket cannot be opened"):
        ActivationCache("nowhere://bucket")
