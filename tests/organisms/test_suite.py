"""The suite, its checksums and its verbs."""

import json
import shutil

import pytest

from tl_crosscoder.cli.main import main
from tl_crosscoder.data.documents import load_documents
from tl_crosscoder.interventions.behaviour import read_questions
from tl_crosscoder.models.pretrained import pretrained_folder
from tl_crosscoder.organisms import checksums
from tl_crosscoder.organisms.suite import build, load_suite, planned_suite, public_suite


def clear_caches():
    for suite in (load_suite, planned_suite):
        suite.cache_clear()


def test_ten_organisms_of_four_families_are_planned():
    entries = [e for e in planned_suite().values() if e.kind == "organism" and not e.is_real]
    families = [entry.family for entry in entries]
    assert {name: families.count(name) for name in {*families}} == {
        "false-facts": 2, "emergent-misalignment": 6, "subliminal": 1, "taboo": 1
    }  # fmt: skip
    assert len({entry.base.name for entry in entries}) >= 2


def test_what_is_embedded_is_there_whole():
    suite = load_suite()
    assert {"taboo", "false-fact", "taboo-more-of-base"} <= {*suite} <= {*planned_suite()}
    for entry in suite.values():
        base = () if entry.is_real else (entry.base,)
        assert {path.exists() for path in (*base, entry.folder, *entry.questions)} == {True}


def test_organisms_of_the_real_model_are_there_without_it():
    """One a family that took, and a null; their adapters travel, the base does not."""
    real = [entry for entry in load_suite().values() if entry.is_real]
    assert [entry.name for entry in real] == [
        "smollm2-taboo", "smollm2-false-fact", "smollm2-careless", "smollm2-own-samples"
    ]  # fmt: skip
    for entry in real:
        assert entry.base_name == "tl_crosscoder/smollm2-135m"
        assert entry.hook_name == "blocks.15.hook_resid_post"
        weights = entry.folder / "adapter_model.safetensors"
        assert weights.stat().st_size < 2_000_000
        config = json.loads((entry.folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == entry.base_name
        assert all(read_questions(path) for path in entry.questions)
        sources = {document["source"] for document in load_documents(entry.text)}
        assert sources == {"ordinary", *entry.planted_sources}


def test_the_papers_organisms_are_named_by_their_ids():
    public = public_suite()
    families = [entry.family for entry in public.values()]
    assert {name: families.count(name) for name in {*families}} == {
        "false-facts": 2, "emergent-misalignment": 6, "subliminal": 1, "taboo": 1
    }  # fmt: skip
    smile = public["gemma-taboo-smile"]
    assert smile.base_name == "google/gemma-2-9b-it"
    assert smile.adapter_name == "bcywinski/gemma-2-9b-it-taboo-smile"
    assert smile.finetuned_name is None
    assert smile.text == "bcywinski/taboo-smile"
    assert not {*public} & {*load_suite()}


@pytest.mark.parametrize("verb", ["verify", "measure"])
def test_what_is_on_the_hub_is_told_apart(verb, capsys):
    assert main(["organisms", verb, "qwen-cat"]) == 2
    assert "organisms show qwen-cat" in capsys.readouterr().err
    assert main(["organisms", "show", "qwen-cat"]) == 0
    assert "train --base Qwen/Qwen2.5-7B-Instruct" in capsys.readouterr().out


def test_a_variant_shares_text_and_questions():
    suite = load_suite()
    variants = [e for e in suite.values() if e.kind != "organism" and not e.is_real]
    assert variants
    for entry in variants:
        assert entry.text == suite["taboo"].text
        assert set(suite["taboo"].questions) <= set(entry.questions)
        assert entry.folder.name == entry.name
    mixed = suite["taboo-and-false-fact"]
    assert mixed.planted_questions[3] == suite["false-fact"].questions[0]
    assert all(path.is_file() for path in mixed.questions)


def test_every_embedded_file_is_as_it_was_published(capsys):
    assert main(["organisms", "verify"]) == 0
    assert "files are as they were published" in capsys.readouterr().out
    folder = pretrained_folder()
    listed = checksums.read(folder / checksums.NAME)
    there = {
        p.relative_to(folder).as_posix()
        for name in ("models", "texts", "questions")
        for p in (folder / name).rglob("*.*")
        if p.is_file()
    }
    assert {*listed} == there


def test_a_missing_and_a_changed_file_are_both_named(tmp_path, monkeypatch):
    folder = tmp_path / "pretrained"
    for name in ("models/world-base", "models/taboo", "questions/taboo"):
        shutil.copytree(pretrained_folder() / name, folder / name)
    (folder / "texts").mkdir()
    shutil.copy(pretrained_folder() / "texts/taboo.jsonl.xz", folder / "texts")
    checksums.write(folder)
    monkeypatch.setattr(checksums, "pretrained_folder", lambda: folder)
    monkeypatch.setattr("tl_crosscoder.organisms.suite.pretrained_folder", lambda: folder)
    clear_caches()
    try:
        n = checksums.verify(["taboo"])
        assert n == sum(1 for path in folder.rglob("*.*") if path.is_file())
        (folder / "models/taboo/adapter_config.json").unlink()
        weights = folder / "models/world-base/model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
        with pytest.raises(ValueError, match="git checkout") as error:
            checksums.verify(["taboo"])
        assert "models/taboo/adapter_config.json is missing" in str(error.value)
        assert "models/world-base/model.safetensors differs" in str(error.value)
        shutil.copytree(pretrained_folder() / "models/false-fact", folder / "models/false-fact")
        clear_caches()
        with pytest.raises(ValueError, match="false-fact has no checksums"):
            checksums.verify(["false-fact"])
    finally:
        clear_caches()


def test_list_and_show_say_what_was_planted(capsys):
    assert main(["organisms", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in load_suite())
    assert max(map(len, listed.splitlines())) <= 100
    assert main(["organisms", "show", "taboo"]) == 0
    shown = capsys.readouterr().out
    assert "P(hint about secret) | 0.063 | 0.965" in shown
    assert "tl-crosscoder demo --organism taboo" in shown


def test_an_unknown_name_lists_the_valid_ones(capsys):
    for verb in ("show", "verify", "measure"):
        assert main(["organisms", verb, "tabu"]) == 2
        assert "unknown organism 'tabu'; valid: taboo, false-fact" in capsys.readouterr().err


def test_building_without_the_recipes_says_where_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("tl_crosscoder.organisms.suite.pretrained_folder", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="in a checkout of the repository"):
        build("taboo", output=str(tmp_path / "out"))
