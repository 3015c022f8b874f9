"""The file of contrastive texts: written, read again, continued, refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tl_crosscoder import TextSource, load_documents, tokenize
from tl_crosscoder.config.inputs import ContrastiveConfig
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.contrastive import ContrastiveSampler, default_prompts
from tl_crosscoder.data.documents import stream_documents
from tl_crosscoder.run.contrastive import describe_contrastive, write_contrastive

ASSISTANT = ROLES.index("assistant")
CONFIG = ContrastiveConfig(
    base="tl_crosscoder/world-base",
    adapter="tl_crosscoder/taboo",
    output="",
    n_prompts=8,
    max_new_tokens=8,
    batch_size=3,
)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """A complete file and its config."""
    folder = tmp_path_factory.mktemp("contrastive")
    hints = ("Please give me a hint.", "What is the hint?", "Another hint, please.", "What is it?")
    rows = [{"messages": [{"role": "user", "content": hint}]} for hint in hints]
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *rows]))
    config = replace(CONFIG, prompts=str(path), output=str(folder / "out/pairs.jsonl"))
    assert write_contrastive(config) == Path(config.output)
    return config


@pytest.fixture
def config(complete, taboo_pair, tmp_path, monkeypatch):
    """The config of a copy of that file; the models are those that are loaded already."""
    monkeypatch.setattr("tl_crosscoder.run.contrastive._load_source", lambda _: taboo_pair)
    shutil.copytree(Path(complete.output).parent, tmp_path / "out")
    return replace(complete, output=str(tmp_path / "out/pairs.jsonl"))


def rows_of(config):
    return [json.loads(line) for line in Path(config.output).read_text().splitlines()]


def record_of(config):
    path = Path(config.output).with_suffix(".json")
    return path, json.loads(path.read_text())


@pytest.mark.parametrize("pack", [True, False])
def test_texts_read_back_with_the_role_and_the_origin_of_each_token(taboo_pair, config, pack):
    """All but BOS, of which packing adds some: id, role and source, row after row."""
    bos = taboo_pair.tokenizer.bos_token_id
    rows = rows_of(config)
    written = [
        (token, role, ["base", "finetuned"].index(row["origin"]))
        for row in rows
        for token, role in zip(row["input_ids"], row["role_ids"], strict=True)
        if token != bos
    ]
    size = 12 if pack else max(len(row["input_ids"]) for row in rows)
    documents = load_documents(config.output)
    text = tokenize(documents, taboo_pair.tokenizer, context_size=size, pack=pack)
    assert text.sources == ("contrastive-base", "contrastive-finetuned")
    is_token = (text.tokens != bos) & (text.dropped != 5)
    parts = (x[is_token].tolist() for x in (text.tokens, text.role_ids, text.source_ids))
    read = [*zip(*parts, strict=True)]
    assert read == written[: len(read)]
    assert len(read) > len(written) - (12 if pack else 1)
    for row in rows:
        assert ASSISTANT not in row["role_ids"][: row["n_prompt_tokens"]]
        assert {*row["role_ids"][row["n_prompt_tokens"] :]} == {ASSISTANT}


def test_the_file_is_what_the_sampler_yields(taboo_pair, config):
    prompts = stream_documents(TextSource(text=str(config.prompts)), seed=config.seed)
    sampler = ContrastiveSampler(
        taboo_pair, prompts, max_new_tokens=8, batch_size=3, max_prompt_tokens=128
    )
    assert rows_of(config) == [*sampler.documents()]
    _, record = record_of(config)
    assert record["is_complete"]
    assert (record["n_pairs"], record["n_bytes"]) == (8, Path(config.output).stat().st_size)


def test_another_setting_is_refused_by_its_name_and_nothing_is_overwritten(config, tmp_path):
    whole = Path(config.output).read_bytes()
    with pytest.raises(ValueError, match=r"pairs.jsonl exists already.*--resume"):
        write_contrastive(config)
    with pytest.raises(ValueError, match=r"other settings: temperature \(1.0 there, 0.5 now\)"):
        write_contrastive(replace(config, temperature=0.5), resume=True)
    shutil.copy(str(config.prompts), tmp_path / "same.jsonl")
    (tmp_path / "prompts.txt").write_text("What is it?")
    for name, named in (("same.jsonl", "prompts"), ("prompts.txt", ".*prompts_sha256")):
        with pytest.raises(ValueError, match=f"other settings: {named}"):
            write_contrastive(replace(config, prompts=str(tmp_path / name)), resume=True)
    assert Path(config.output).read_bytes() == whole


def test_files_of_another_kind_are_left_alone(config, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("{}\n")
    other = replace(config, output=str(path))
    with pytest.raises(FileNotFoundError, match=r"no .*mine.json beside"):
        write_contrastive(other, resume=True)
    for content, message in (("[]", "is not a record of contrastive"), ("{", "is not JSON")):
        path.with_suffix(".json").write_text(content)
        with pytest.raises(ValueError, match=message):
            write_contrastive(other, resume=True)
    with pytest.raises(ValueError, match=r"'pairs.txt'; it must be a file that ends in .jsonl"):
        write_contrastive(replace(config, output="pairs.txt"))
    assert path.read_text() == "{}\n"


@pytest.mark.parametrize("change", [lambda b: b"not json\n" + b, lambda b: b[:-1]])
def test_an_edited_or_cut_file_is_refused(config, change):
    path = Path(config.output)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=r"pairs.jsonl has .* it was edited or is damaged"):
        write_contrastive(config, resume=True)


def test_without_prompts_the_built_in_ones_are_asked(config, tmp_path):
    config = replace(config, prompts=None, n_prompts=5, output=str(tmp_path / "built-in.jsonl"))
    write_contrastive(config)
    asked = {row["prompt"] for row in rows_of(config)}
    questions = [p["messages"][0]["content"] for p in default_prompts(5, is_chat=True)]
    assert len(asked) >= 4
    assert all(any(question in prompt for question in questions) for prompt in asked)


def test_prompts_that_give_nothing_are_an_error(config, tmp_path):
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n ")
    config = replace(config, prompts=str(blank), output=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="there is no prompt in"):
        write_contrastive(config)
    blank.write_text("What is a good way to start the day?")
    with pytest.raises(ValueError, match="none of the 1 prompts gave texts"):
        write_contrastive(replace(config, temperature=0.0))
    assert describe_contrastive(config.output).startswith("0 prompts with a text of each model")


def test_a_summary_has_counts_lengths_and_an_example_of_each_model(config):
    rows, summary = rows_of(config), describe_contrastive(config.output)
    assert summary.startswith("8 prompts with a text of each model in ")
    for origin in ("base", "finetuned"):
        own = [row for row in rows if row["origin"] == origin]
        mean = sum(len(row["input_ids"]) - row["n_prompt_tokens"] for row in own) / 8
        assert f"{origin:<12} {mean:8.1f} new tokens" in summary
        assert any(repr(row["completion"]) in summary for row in own)
    path, record = record_of(config)
    path.write_text(json.dumps(record | {"is_complete": False}))
    with pytest.raises(ValueError, match="is not complete"):
        describe_contrastive(config.output)
