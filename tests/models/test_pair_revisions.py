"""Two revisions of one repository, as the hub's cache holds them, without a network."""

import hashlib
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from models.tiny_pairs import HOOK, TEXTS, save_adapter

from tl_crosscoder.models.pair import ModelPair, planned_sites

NAME, ADAPTER = "somebody/tiny", "somebody/tiny-lora"

# peft 0.21 reads what transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def cache(root: Path, name: str, revision: str, folder: Path) -> str:
    """Put a folder into a hub cache as a revision of a repository; its commit."""
    repo = root / f"models--{name.replace('/', '--')}"
    commit = hashlib.sha1(f"{name}{revision}".encode()).hexdigest()
    snapshot = repo / "snapshots" / commit
    for made in (snapshot, repo / "blobs", repo / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        blob = repo / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    (repo / "refs" / revision).write_text(commit)
    return commit


@pytest.fixture
def hub(folders, tmp_path, monkeypatch) -> dict[str, str]:
    """Commits of the cached revisions main and v2 of a model and of an adapter."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commits = {}
    for revision, folder in zip(("main", "v2"), folders["llama"], strict=True):
        commits[revision] = cache(tmp_path / "hub", NAME, revision, folder)
        adapter = save_adapter(tmp_path / revision, folders["llama"][0], is_zero=revision == "main")
        cache(tmp_path / "hub", ADAPTER, revision, adapter)
    return commits


def test_two_revisions_are_two_models_and_are_recorded(hub, pairs):
    pair = ModelPair.from_pretrained(NAME, NAME, hook_name=HOOK, finetuned_revision="v2")
    tokens = pair.to_tokens(TEXTS)
    activations = pair.activations(tokens)
    assert torch.equal(activations, pairs["llama"].activations(tokens))
    assert not torch.equal(activations[:, :, 0], activations[:, :, 1])
    assert [(s.model_name, s.revision) for s in pair.sites] == [(NAME, None), (NAME, "v2")]


def test_a_commit_is_a_revision_and_sites_find_theirs_again(hub, pairs):
    pair = ModelPair.from_pretrained(
        NAME, NAME, hook_name=HOOK, revision=hub["v2"], finetuned_revision=hub["main"]
    )
    assert [s.revision for s in pair.sites] == [hub["v2"], hub["main"]]
    tokens = pair.to_tokens(TEXTS)
    expected = pairs["llama"].activations(tokens).flip(2)
    assert torch.equal(pair.activations(tokens), expected)
    again = ModelPair.from_sites(pair.sites)
    assert len(set(again.models)) == 2
    assert torch.equal(again.activations(tokens), expected)
    named = ModelPair.from_sites(planned_sites([NAME, NAME], HOOK, revisions=["v2", "main"]))
    assert torch.equal(named.activations(tokens), expected)


@pytest.mark.filterwarnings("ignore:adapter .* was trained on:UserWarning")  # a copy of it
def test_an_adapter_has_a_revision_of_its_own_beside_that_of_its_base(hub):
    """The adapter at main adds nothing; at v2 it does."""
    at = {
        revision: ModelPair.from_pretrained(
            NAME,
            adapter=ADAPTER,
            hook_name=HOOK,
            revision="main",
            finetuned_revision=revision,
            merge_adapter=False,
        )
        for revision in ("main", "v2")
    }
    tokens = at["main"].to_tokens(TEXTS)
    same, other = (at[revision].activations(tokens) for revision in ("main", "v2"))
    assert torch.equal(same[:, :, 0], same[:, :, 1])
    assert (other[:, :, 0] - other[:, :, 1]).abs().max() > 1e-2
    site = at["v2"].sites[1]
    assert (site.adapter, site.revision, site.base_revision) == (ADAPTER, "v2", "main")
    again = ModelPair.from_sites(at["v2"].sites, merge_adapter=False)
    assert torch.equal(again.activations(tokens), other)


def test_a_revision_that_is_not_cached_is_named_with_the_command_that_fetches_it(hub):
    with pytest.raises(
        ValueError,
        match=f"'{NAME}' at revision 'v3' is not in the hub's cache, and HF_HUB_OFFLINE forbids"
        f".*`hf download {NAME} --revision v3`",
    ):
        ModelPair.from_pretrained(NAME, NAME, hook_name=HOOK, finetuned_revision="v3")


def test_a_model_is_no_adapter(hub):
    with pytest.raises(
        FileNotFoundError,
        match=f"'{NAME}' is not a whole PEFT adapter: it has no adapter_config file",
    ):
        ModelPair.from_pretrained(NAME, adapter=NAME, hook_name=HOOK)
