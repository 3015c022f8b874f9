"""Publishing, against a hub on this machine that speaks the calls of the client."""

import json
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub.hub_server import READ_ONLY
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import sae_lens_huggingface_loader
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from tl_crosscoder import Crosscoder, Site
from tl_crosscoder.cli.hub import Publish
from tl_crosscoder.crosscoder.config import CrosscoderConfig
from tl_crosscoder.files import CFG_NAME, WEIGHTS_NAME
from tl_crosscoder.hub.card import dictionary_card
from tl_crosscoder.hub.loading import load_pretrained
from tl_crosscoder.hub.publish import Publication, plan_publication, push
from tl_crosscoder.hub.published_run import PublishedRun
from tl_crosscoder.interventions.changes_result import Change, Changes
from tl_crosscoder.models.pretrained import pretrained_folder

EMBEDDED = pretrained_folder() / "dictionaries/taboo-batchtopk"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A dictionary of 16 latents over 2 x 4, with a record that names folders here."""
    torch.manual_seed(0)
    names = {"base": "org/base", "finetuned": "models/sft"}
    sites = tuple(
        Site(name=n, d_model=4, hook_name="blocks.0.hook_resid_post", model_name=m, scale=0.5)
        for n, m in names.items()
    )
    crosscoder = Crosscoder(CrosscoderConfig(d_in=8, d_sae=16, sites=sites))
    with torch.no_grad():
        crosscoder.load_state_dict(
            {n: torch.randn_like(p) for n, p in crosscoder.state_dict().items()}
        )
    folder = crosscoder.save(tmp_path / "runs/tiny")
    record = json.loads((EMBEDDED / "runner_cfg.json").read_text())
    record["training"] |= {"output": str(folder), "cache": "/data/cache"}
    (folder / "runner_cfg.json").write_text(json.dumps(record, indent=2))
    return folder


def planned(folder: Path, repo: str = "org/cc", **options) -> Publication:
    return plan_publication(folder, repo, **{"licence": "mit", **options})


def sent(folder: Path, repo: str = "org/cc", **options) -> Publication:
    plan = planned(folder, repo, **options)
    push(plan)
    return plan


def weights_of(crosscoder: SAE) -> dict[str, torch.Tensor]:
    return dict(crosscoder.state_dict())


def assert_same_bits(one: SAE, other: SAE) -> None:
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_plan_says_everything_and_sends_nothing(hub, capsys):
    Publish(dictionary=str(EMBEDDED), repo="org/cc", license="mit", id="taboo")()
    said = capsys.readouterr().out
    assert not hub.writes()
    assert not hub.repos
    names = {CFG_NAME, WEIGHTS_NAME, "runner_cfg.json", "analysis.json", "analysis.safetensors"}
    names |= {"README.md", "patching.json", "changes.json"}
    names |= {"ablation_behaviour_hint-about-secret.json"}
    names |= {"saelens/cfg.json", "saelens/README.md"}
    assert all(f"  taboo/{name} " in said for name in names)
    assert "taboo/examples.sqlite" not in said
    assert "Nothing was sent. Add --push" in said
    # The card is made from the run: its numbers are those of analysis.json and patching.json.
    measured = json.loads((EMBEDDED / "analysis.json").read_text())["reconstruction"]
    assert f"| FVE base | {measured['fve']['base']:.3f} |" in said
    assert f"| L0 | {measured['l0']:.1f} | " in said
    assert "| top 30 | 30 | " in said
    assert "library_name: saelens" in said
    assert "license: mit" in said
    assert 'Crosscoder.from_pretrained("org/cc", "taboo")' in said


def test_examples_and_places_stay_here_unless_asked(hub, tiny):
    plan = planned(EMBEDDED, id="taboo")
    tops = json.loads(plan.text("taboo/analysis.json"))["top"]
    assert tops
    assert not any(top["examples"] for top in tops)
    asked = json.loads(planned(EMBEDDED, id="a", with_examples=True).text("a/analysis.json"))
    assert all(top["examples"] for top in asked["top"])
    (tiny / "examples.sqlite").write_bytes(b"text of the dataset")
    files = [planned(tiny, with_examples=w).files for w in (False, True)]
    assert ["tiny/examples.sqlite" in paths for paths in files] == [False, True]
    training = json.loads(planned(tiny).text("tiny/runner_cfg.json"))["training"]
    assert (training["output"], training["cache"]) == (None, None)


def test_what_changed_travels_with_its_texts_only_where_asked(hub, tiny):
    row = {f.name: {str: "", int: 1, float: 0.5}.get(f.type, ()) for f in fields(Change)}
    row |= {"latents": (3, 4), "before": "Is it the moon?", "passages": ("secret",)}
    facts = {f.name: {str: "x", float: 0.5}.get(f.type, ()) for f in fields(Changes)}
    facts |= {"rows": (Change(**row),), "compared": ("base", "finetuned"), "texts": {}}
    Changes(**facts).save(tiny / "changes.json")
    for with_examples in (False, True):
        plan = planned(tiny, with_examples=with_examples)
        for name in ("tiny/changes.json", "tiny/README.md"):
            assert ("Is it the moon?" in plan.text(name)) == with_examples
        assert "secret" not in plan.text("tiny/README.md")
        assert "## What changed" in plan.text("tiny/README.md")
        assert "latents 3, 4: removing them undoes 50%" in plan.text("tiny/README.md")
        assert "tiny/waterfall.json" not in plan.files


def test_the_code_of_a_card_runs():
    """Of one that comes with the package, as it stands."""
    card = (EMBEDDED / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "# [1, pos, 2, 96]\n" in code
    assert "# [1, pos, 1024]\n" in code
    assert names["x"].shape == (1, names["x"].shape[1], 2, 96)
    assert names["latents"].shape == (1, names["x"].shape[1], 1024)


def test_a_card_says_what_goes_into_the_dictionary(tmp_path):
    """Sites of one width stacked, others side by side; of a diff-SAE the difference."""
    base, same, wider = (
        Site(name=n, d_model=d, hook_name="h", model_name=f"org/{n}")
        for n, d in (("base", 4), ("same", 4), ("wider", 6))
    )
    difference = replace(same, name="difference", minus=base)
    cards = []
    for sites in ((base, same), (base, wider), (difference,)):
        cfg = CrosscoderConfig(d_in=sum(s.d_model for s in sites), d_sae=16, sites=sites)
        run = PublishedRun.read(Crosscoder(cfg).save(tmp_path / sites[-1].name))
        cards.append(dictionary_card(run, id="x", repo="org/cc", licence="mit"))
    assert "# [1, pos, 2, 4]\n" in cards[0]
    assert "# [1, pos, 10]\n" in cards[1]
    assert "A diff-SAE: " in cards[2]
    assert "# x: the first model's activations minus the second's, [..., 4] ->" in cards[2]
    assert "side by side" not in cards[2]


def test_what_was_pushed_loads_to_the_same_bits(hub, tiny, capsys):
    """By this package's way and by SAELens's, and without our class; two in one repository."""
    Publish(dictionary=str(EMBEDDED), repo="org/cc", license="mit", id="taboo", push=True)()
    said = capsys.readouterr().out
    assert f"Published: {hub.url}/org/cc/commit/" in said
    assert "--- README.md ---" not in said  # it was to be read before
    sent(tiny, renamed={"models/sft": "org/sft"})
    local = Crosscoder.load(EMBEDDED)
    loaded = Crosscoder.from_pretrained("org/cc", "taboo")
    assert_same_bits(loaded, local)
    assert loaded.sites == local.sites
    assert_same_bits(SAE.from_pretrained("org/cc", "taboo"), local)
    assert isinstance(SAE.from_pretrained("org/cc", "tiny"), Crosscoder)
    theirs = Crosscoder.from_pretrained("org/cc", "taboo", converter=sae_lens_huggingface_loader)
    assert_same_bits(theirs, local)
    tiny_loaded = Crosscoder.from_pretrained(release="org/cc", sae_id="tiny", device="cpu")
    assert_same_bits(tiny_loaded, Crosscoder.load(tiny))
    assert [s.model_name for s in tiny_loaded.sites] == ["org/base", "org/sft"]
    x = torch.randn(32, 8)
    plain = SAE.from_pretrained("org/cc", "tiny/saelens")
    assert type(plain) is JumpReLUSAE  # of SAELens itself: it needs nothing of this package
    assert torch.equal(plain.encode(x), Crosscoder.load(tiny).encode(x))
    assert (plain.encode(x) > 0).any()


def test_a_repository_keeps_what_is_in_it(hub, tiny):
    sent(tiny, id="first", renamed={"models/sft": "org/sft"})
    before = hub.files("org/cc")
    ours = before["README.md"].decode()
    mine = ours.replace("<!-- tl_crosscoder: dict", "In /data/x.\n\n<!-- tl_crosscoder: dict")
    hub.repos["org/cc"].commit({**before, "README.md": mine.encode(), "notes.md": b"notes"})
    sent(EMBEDDED, id="second")
    after = hub.files("org/cc")
    assert {p: after[p] for p in before if p != "README.md"} == {
        p: d for p, d in before.items() if p != "README.md"
    }
    assert after["notes.md"] == b"notes"
    card = after["README.md"].decode()
    assert card.count("# Crosscoders\n") == 1
    assert "In /data/x." in card  # somebody else's text is no reason not to publish
    assert "| [first](first/README.md) | `org/base`, `org/sft` |" in card
    assert "| [second](second/README.md) |" in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == ["org/base", "org/sft"]  # the embedded ones are not on the hub
    assert front["tags"][0] == "crosscoder"


def test_a_taken_id_is_replaced_only_when_asked(hub, tiny):
    sent(EMBEDDED, id="one")
    assert "org/cc has a dictionary 'one' already" in planned(tiny, id="one").refusals[0]
    with pytest.raises(ValueError, match=r"nothing was sent: .1. org/cc has a dictionary 'one'"):
        sent(tiny, id="one")
    plan = sent(tiny, id="one", overwrite=True)
    assert "one/patching.json" in plan.deleted
    assert {p for p in hub.files("org/cc") if p.startswith("one/")} == {
        path for path in plan.files if path.startswith("one/")
    }


def test_secrets_and_paths_are_refused_with_their_line(hub, tiny):
    record = json.loads((tiny / "runner_cfg.json").read_text())
    record["training"]["wandb_project"] = "hf_" + "a" * 30
    record["training"]["text"] = "/data/private/chats.jsonl"
    lines = json.dumps(record, indent=2).splitlines()
    (tiny / "runner_cfg.json").write_text("\n".join(lines))
    plan = planned(tiny)
    line = next(i for i, text in enumerate(lines, 1) if "wandb_project" in text)
    said = f"tiny/runner_cfg.json:{line}: a Hugging Face token, 'hf_a…'"
    assert said in plan.refusals
    assert not [r for r in plan.refusals if "a" * 30 in r]
    assert any("a path of this machine, '/data/private/chats.jsonl'" in r for r in plan.refusals)
    with pytest.raises(ValueError, match="nothing was sent"):
        push(plan)
    renamed = planned(tiny, renamed={"/data/private": "org/chats"})
    assert not [r for r in renamed.refusals if "/data" in r]
    assert json.loads(renamed.text("tiny/runner_cfg.json"))["training"]["text"] == (
        "org/chats/chats.jsonl"
    )
    assert not hub.writes()


def test_a_licence_is_needed_and_is_one(hub, tiny):
    plan = planned(tiny, licence=None)
    assert plan.refusals[0].startswith("there is no licence: give one (--license)")
    with pytest.raises(ValueError, match="1 reason not to publish this"):
        Publish(dictionary=str(tiny), repo="org/cc")()
    with pytest.raises(ValueError, match=r'org/cc: nothing was published: .*"license" must be one'):
        sent(tiny, licence="my-own")
    sent(tiny)
    other = planned(EMBEDDED, licence="gemma")
    assert "org/cc is under the licence 'mit', not 'gemma'" in other.refusals[0]


def test_who_may_not_write_is_told_before_long_work(hub, tiny, monkeypatch, tmp_path):
    publish = Publish(dictionary=str(tmp_path / "nothing here"), repo="org/cc", push=True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match=r"does not know the token that is set here\. Log in with"):
        publish()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"nobody is logged in to the hub here\. Log in with"):
        publish()
    monkeypatch.setenv("HF_TOKEN", READ_ONLY)
    with pytest.raises(ValueError, match="the account that is logged in may not write to it"):
        sent(tiny)
    assert not hub.repos


def test_a_race_and_a_hub_that_is_away_send_nothing(hub, tiny, monkeypatch):
    sent(tiny, id="one")
    plan = planned(EMBEDDED, id="two")
    hub.repos["org/cc"].commit({**hub.files("org/cc"), "new": b""})
    with pytest.raises(ValueError, match="somebody has pushed to it since it was read"):
        push(plan)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    away = planned(EMBEDDED, id="two")
    assert away.warnings[0].startswith("the repository could not be read")
    with pytest.raises(ValueError, match="the hub did not answer"):
        push(away)


def test_private_is_for_new_repositories(hub, tiny):
    sent(tiny, "org/secret", private=True)
    assert hub.repos["org/secret"].private
    sent(tiny, "org/open")
    assert planned(tiny, "org/open", id="b", private=True).refusals == (
        "org/open is public: --private is for a new repository.",
    )


def test_a_damaged_dictionary_and_bad_names_go_nowhere(hub, tiny, tmp_path):
    with pytest.raises(ValueError, match="'cc' names no owner"):
        planned(tiny, "cc")
    with pytest.raises(ValueError, match="the id 'a/b' cannot name a folder"):
        planned(tiny, id="a/b")
    with pytest.raises(ValueError, match="--rename is 'models': give HERE=THERE"):
        Publish(dictionary=str(tiny), repo="org/cc", rename=("models",))()
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny, damaged)
    (damaged / WEIGHTS_NAME).write_bytes((tiny / WEIGHTS_NAME).read_bytes()[:-8])
    with pytest.raises(ValueError, match="cannot be read"):
        planned(damaged)


def test_a_missing_dictionary_is_answered_with_those_that_are_there(hub, tiny):
    sent(tiny, id="layer-13")
    head = hub.repos["org/cc"].head[0]
    assert_same_bits(load_pretrained(f"org/cc@{head}", "layer-13"), Crosscoder.load(tiny))
    with pytest.raises(ValueError, match=r"org/cc has no dictionary 'layer-12'; nearest: 'layer-1"):
        Crosscoder.from_pretrained("org/cc", "layer-12")
    with pytest.raises(ValueError, match="has no revision 'v9'"):
        Crosscoder.from_pretrained("org/cc", "layer-13", revision="v9")
    with pytest.raises(ValueError, match="'org/nothing' is not on the hub, or is private"):
        Crosscoder.from_pretrained("org/nothing", "layer-13")
    with pytest.raises(ValueError, match="names the revision 'v1', and revision='v2' another one"):
        Crosscoder.from_pretrained("org/cc@v1", "layer-13", revision="v2")
