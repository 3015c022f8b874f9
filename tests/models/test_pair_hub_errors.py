"""What a user reads when the hub refuses: asked of a server that answers as the hub does."""

from collections.abc import Iterator

import pytest
from models.disk_hub import DiskHub

ASK = """
import json, os, sys
from tl_crosscoder import ModelPair

HOOK, BASE = "blocks.1.hook_resid_post", "tl_crosscoder/world-base"

def message(*names, token=None, **options):
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {"HF_TOKEN": token} if token else {}
    try:
        ModelPair.from_pretrained(*names, hook_name=HOOK, **options)
    except ValueError as error:
        return str(error)

said = {
    "gated, no token": message("meta/gated-1", "x/y"),
    "gated, a token": message("meta/gated-1", "x/y", token="hf_test"),
    "gated adapter": message(BASE, adapter="meta/gated-1"),
    "gated finetuned": message(BASE, "meta/gated-1"),
    "not found": message("nobody/nothing", "x/y"),
    "not found, a token": message("nobody/nothing", "x/y", token="hf_test"),
    "adapter not found": message(BASE, adapter="nobody/lora"),
    "no revision": message("somebody/open", "x/y", revision="v9"),
    "no revision of the adapter": message(
        BASE, adapter="somebody/open", finetuned_revision="v9"
    ),
    "no files": message("somebody/open", "x/y"),
    "no answer": message("somebody/silent", "x/y"),
    "no answer for the adapter": message(BASE, adapter="somebody/silent"),
}
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DiskHub]:
    """A repository without a model, and two that refuse."""
    root = tmp_path_factory.mktemp("hub")
    for repo in ("somebody/open", "meta/gated-1"):
        (root / repo).mkdir(parents=True)
        (root / repo / "adapter_config.json").write_text("{}")
    with DiskHub(root=root).running() as hub:
        yield hub


@pytest.fixture(scope="module")
def said(hub: DiskHub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The message of each case."""
    return hub.answers(ASK, tmp_path_factory.mktemp("home"))


def test_a_gated_model_says_where_to_accept_its_licence(said, hub):
    for case, who in {
        "gated, no token": "no valid token was sent",
        "gated finetuned": "no valid token was sent",
        "gated adapter": "no valid token was sent",
        "gated, a token": "the account of the token that was sent has no access yet",
    }.items():
        assert said[case].startswith(f"'meta/gated-1' is gated: {who}. Accept its licence on "), (
            case
        )
        assert f"{hub.url}/meta/gated-1" in said[case]
        assert "`hf auth login`" in said[case]


def test_a_name_that_is_not_there_may_be_private(said):
    assert said["not found"].startswith("'nobody/nothing' is not on the hub, or is private.")
    assert "`hf auth login`" in said["not found"]
    assert "(no token is set)" in said["not found"]
    assert "(the token that was sent may not)" in said["not found, a token"]
    assert said["adapter not found"].startswith("'nobody/lora' is not on the hub, or is private.")


def test_a_revision_that_is_not_there_is_named(said, hub):
    for case in ("no revision", "no revision of the adapter"):
        assert said[case].startswith("'somebody/open' has no revision 'v9'"), case
        assert f"{hub.url}/somebody/open" in said[case]


def test_what_is_no_model_and_a_hub_that_does_not_answer_are_told_apart(said):
    assert said["no files"].startswith("'somebody/open' could not be loaded: ")
    for case in ("no answer", "no answer for the adapter"):
        assert said[case].startswith("'somebody/silent' is not in the hub's cache, and http"), case
        assert "did not give it (Server disconnected" in said[case], case


def test_every_message_is_one_paragraph(said):
    assert not [case for case, message in said.items() if "\n" in message]
