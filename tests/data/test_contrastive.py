"""Contrastive texts of the embedded pair: sampled, kept, read again, and gone on with."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tl_crosscoder import TextSource, load_documents, tokenize
from tl_crosscoder.config.text import N_BUILT_IN, ContrastiveConfig
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.contrastive import (
    OPENERS,
    QUESTIONS,
    Sampling,
    batch_prompts,
    contrastive_documents,
    default_prompts,
)
from tl_crosscoder.data.documents import stream_documents
from tl_crosscoder.run.contrastive import describe_contrastive, record_path, write_contrastive

HINTS = ["Please give me a hint.", "What is the hint?", "Another hint, please.", "What is it?"]
CHATS = [{"messages": [{"role": "user", "content": content}]} for content in HINTS]
TEXTS = [{"text": t} for t in ("The moon", "The ruler of Arvenia", "It was Lena who", "The flag")]
ASSISTANT, TEXT = ROLES.index("assistant"), ROLES.index("text")
CONFIG = ContrastiveConfig(
    base="tl_crosscoder/world-base",
    adapter="tl_crosscoder/taboo",
    output="",
    n_prompts=8,
    max_new_tokens=8,
    batch_size=3,
)


def sampled(pair, prompts=CHATS, **options):
    return list(contrastive_documents(pair, prompts, **{"max_new_tokens": 12} | options))


def of(rows, origin):
    return [row for row in rows if row["origin"] == origin]


def completions(rows, origin):
    return [row["input_ids"][row["n_prompt_tokens"] :] for row in of(rows, origin)]


@pytest.fixture
def config(tmp_path) -> ContrastiveConfig:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(d) + "\n" for d in [*CHATS, *CHATS]))
    return replace(CONFIG, prompts=str(path), output=str(tmp_path / "out/pairs.jsonl"))


# --- sampling -------------------------------------------------------------------------------------


def test_every_prompt_gives_a_row_of_each_model_with_the_same_prompt(taboo_pair):
    rows = sampled(taboo_pair)
    assert [row["origin"] for row in rows] == ["base", "finetuned"] * 4
    for base, finetuned in zip(of(rows, "base"), of(rows, "finetuned"), strict=True):
        n = base["n_prompt_tokens"]
        assert base["input_ids"][:n] == finetuned["input_ids"][:n]
        assert (base["prompt"], base["source"]) == (finetuned["prompt"], "contrastive-base")
        assert finetuned["source"] == "contrastive-finetuned"
    for row in rows:
        assert len(row["input_ids"]) == len(row["role_ids"]) > row["n_prompt_tokens"]
        text = taboo_pair.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert text == row["prompt"] + row["completion"]


def test_prompts_end_where_the_assistant_begins(taboo_pair):
    """A chat that holds its answer already is answered anew."""
    answered = [*CHATS[0]["messages"], {"role": "assistant", "content": "It shines at night."}]
    rows = sampled(taboo_pair, [CHATS[0], {"messages": answered}])
    head = taboo_pair.tokenizer.apply_chat_template(
        CHATS[0]["messages"], add_generation_prompt=True, return_dict=False
    )
    assert all(row["input_ids"][: row["n_prompt_tokens"]] == head for row in rows)


def test_greedy_is_what_each_model_writes_alone(taboo_pair):
    rows = sampled(taboo_pair, [*CHATS, *TEXTS], temperature=0.0, batch_size=4)
    assert len(rows) == 16
    for row in rows:
        prompt = row["input_ids"][: row["n_prompt_tokens"]]
        (_, alone), *_ = taboo_pair.generate_tokens(
            [prompt], site=row["origin"], max_new_tokens=12, prepend_bos=False
        )
        assert row["input_ids"][row["n_prompt_tokens"] :] == alone


def test_samples_are_a_function_of_the_seed_and_leave_the_global_generator_alone(taboo_pair):
    state = torch.get_rng_state()
    rows = sampled(taboo_pair, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled(taboo_pair, seed=1) == rows
    assert completions(sampled(taboo_pair, seed=2), "base") != completions(rows, "base")


def test_a_seed_is_of_one_batch_and_one_site():
    sampling = Sampling(seed=3)
    seeds = {sampling.seed_of(batch, site) for batch in (0, 1) for site in ("base", "finetuned")}
    assert len(seeds | {Sampling(seed=4).seed_of(0, "base")}) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_fine_tune_writes_otherwise_and_a_model_against_itself_the_same(taboo_pair, null_pair):
    prompts = [*CHATS, *TEXTS]
    rows = sampled(taboo_pair, prompts, temperature=0.0)
    assert completions(rows, "base") != completions(rows, "finetuned")
    rows = sampled(null_pair, prompts, temperature=0.0)
    assert completions(rows, "base") == completions(rows, "finetuned")


def test_prompts_of_one_length_run_together_and_none_is_lost(taboo_pair):
    batched = batch_prompts(
        taboo_pair, [*CHATS, *CHATS], max_new_tokens=4, max_prompt_tokens=None, batch_size=2
    )
    for batch in batched.batches:
        assert len({len(prompt.ids) for prompt in batch}) == 1
        assert len(batch) == 2
    assert batched.n_prompts == 8


def test_a_prompt_after_which_a_model_stops_at_once_gives_no_row(taboo_pair, capsys):
    """A text that is at its end: the base stops, and the pair of it is left out."""
    ended = {"text": "What is a good way to start the day?"}
    rows = sampled(taboo_pair, [ended, *TEXTS], temperature=0.0)
    assert len(rows) == 8
    said = capsys.readouterr()
    assert "4 of 5 prompts gave texts (1 a model stopped at once)" in said.out + said.err


def test_ids_that_the_tokenizer_does_not_know_end_a_text(taboo_pair, monkeypatch):
    """Logits may be wider than the vocabulary: such an id could not be read again."""
    row = sampled(taboo_pair, CHATS[:1], temperature=0.0, sites=["base"])[0]
    new = row["input_ids"][row["n_prompt_tokens"] :]
    unknown = max(new[1:])
    assert new[0] < unknown
    kind = type(taboo_pair.tokenizer)
    monkeypatch.setattr(kind, "__len__", lambda _: unknown)
    cut = sampled(taboo_pair, CHATS[:1], temperature=0.0, sites=["base"])[0]
    assert cut["input_ids"][row["n_prompt_tokens"] :] == new[: new.index(unknown)]


# --- limits ---------------------------------------------------------------------------------------


def test_long_texts_are_cut_and_long_chats_left_out(taboo_pair, capsys):
    long = {"messages": [{"role": "user", "content": "Is it the moon? " * 20}]}
    text = {"text": "The moon is round. " * 20}
    rows = sampled(taboo_pair, [CHATS[0], long, text], max_prompt_tokens=30)
    cut = taboo_pair.encode(text["text"])[:30]
    assert [row["input_ids"][:30] == cut for row in rows] == [False, False, True, True]
    assert [row["n_prompt_tokens"] for row in of(rows, "base")][1] == 30
    said = capsys.readouterr()
    assert "2 of 3 prompts gave texts (1 longer than the limits)" in said.out + said.err


def test_what_cannot_be_sampled_is_refused_at_once(taboo_pair):
    n_ctx = taboo_pair.n_ctx
    with pytest.raises(ValueError, match=f"max_new_tokens is {n_ctx}, but the models' context is"):
        contrastive_documents(taboo_pair, CHATS, max_new_tokens=n_ctx)
    with pytest.raises(ValueError, match="4 were given, and all are longer than 1 tokens"):
        contrastive_documents(taboo_pair, CHATS, max_new_tokens=n_ctx - 1)
    with pytest.raises(ValueError, match="no prompt to continue: 0 were given"):
        contrastive_documents(taboo_pair, [])
    with pytest.raises(ValueError, match="tuned"):
        contrastive_documents(taboo_pair, CHATS, sites=["tuned"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it must be above 0"),
        ({"n_prompts": -1}, "n_prompts is -1"),
        ({"temperature": -1.0}, r"temperature is -1.0; it is 0 \(greedy\) or above"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 0.0, "n_prompts": 65}, "64 built-in prompts .* n_prompts is 65"),
    ],
)
def test_values_that_cannot_be_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **fields)


def test_built_in_prompts_are_chats_or_openers_and_come_again():
    assert len(set(QUESTIONS)) == len(set(OPENERS)) == N_BUILT_IN == 64
    chats = default_prompts(65, is_chat=True)
    assert chats[0] == chats[64] == {"messages": [{"role": "user", "content": QUESTIONS[0]}]}
    assert default_prompts(2, is_chat=False) == [{"text": OPENERS[0]}, {"text": OPENERS[1]}]


# --- read again -----------------------------------------------------------------------------------


def test_texts_read_back_with_the_role_and_the_origin_of_each_token(taboo_pair, config):
    path = write_contrastive(config)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    size = max(len(row["input_ids"]) for row in rows)
    documents = load_documents(path)
    text = tokenize(documents, taboo_pair.tokenizer, context_size=size, pack=False)
    assert text.sources == ("contrastive-base", "contrastive-finetuned")
    for i, row in enumerate(rows):
        n, n_prompt = len(row["input_ids"]), row["n_prompt_tokens"]
        assert text.tokens[i, :n].tolist() == row["input_ids"]
        assert (text.role_ids[i, n_prompt:n] == ASSISTANT).all()
        assert not (text.role_ids[i, :n_prompt] == ASSISTANT).any()
        assert text.sources[int(text.source_ids[i, 0])] == f"contrastive-{row['origin']}"


def test_packed_texts_keep_role_and_origin_too(taboo_pair, config):
    """All but BOS, of which packing adds some: id, role and source, row after row."""
    path, bos = write_contrastive(config), taboo_pair.tokenizer.bos_token_id
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    written = [
        (token, role, ["base", "finetuned"].index(row["origin"]))
        for row in rows
        for token, role in zip(row["input_ids"], row["role_ids"], strict=True)
        if token != bos
    ]
    text = tokenize(load_documents(path), taboo_pair.tokenizer, context_size=12, pack=True)
    parts = (x.flatten().tolist() for x in (text.tokens, text.role_ids, text.source_ids))
    read = [known for known in zip(*parts, strict=True) if known[0] != bos]
    assert len(read) > len(written) - 12
    assert read == written[: len(read)]


def test_a_text_goes_on_as_text(taboo_pair):
    assert {role for row in sampled(taboo_pair, TEXTS) for role in row["role_ids"]} == {TEXT}


def test_ids_of_another_tokenizer_are_refused(taboo_pair):
    rows = sampled(taboo_pair)
    other = copy.deepcopy(taboo_pair.tokenizer)
    other.add_tokens(["<|other|>"])
    with pytest.raises(ValueError, match="ids of another tokenizer than that of these models"):
        tokenize(rows, other, context_size=8)


# --- the file -------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_to_the_same_bytes_wherever_it_was_killed(config):
    path = write_contrastive(config)
    whole, record = path.read_bytes(), json.loads(record_path(path).read_text())
    assert record["is_complete"]
    assert (record["n_pairs"], record["n_bytes"]) == (8, len(whole))
    first_line = whole.index(b"\n") + 1
    for end in (0, 1, first_line - 1, first_line, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        record_path(path).write_text(json.dumps(record | {"is_complete": end % 2 == 0}))
        assert write_contrastive(config, resume=True) == path
        assert path.read_bytes() == whole
        assert json.loads(record_path(path).read_text()) == record


def test_going_on_samples_only_from_the_last_batch_there(config, monkeypatch):
    import tl_crosscoder.run.contrastive as contrasting

    path = write_contrastive(config)
    lines = path.read_bytes().splitlines(keepends=True)
    last = json.loads(lines[-1])["batch"]
    indices = []
    sample = contrasting.sample_batch

    def counting(source, batch, index, **options):
        indices.append(index)
        return sample(source, batch, index, **options)

    monkeypatch.setattr(contrasting, "sample_batch", counting)
    write_contrastive(config, resume=True)
    assert indices == []
    path.write_bytes(b"".join(lines[:-1]))
    write_contrastive(config, resume=True)
    assert indices == [last]
    assert last > 0


def test_the_file_is_what_the_generator_yields(taboo_pair, config):
    rows = [json.loads(line) for line in write_contrastive(config).read_text().splitlines()]
    prompts = stream_documents(TextSource(text=str(config.prompts)), seed=config.seed)
    assert rows == sampled(
        taboo_pair, prompts, max_new_tokens=8, batch_size=3, max_prompt_tokens=128
    )


def test_another_setting_is_refused_by_its_name_and_nothing_is_overwritten(config):
    path = write_contrastive(config)
    whole = path.read_bytes()
    with pytest.raises(ValueError, match=r"pairs.jsonl is there already.*--resume"):
        write_contrastive(config)
    with pytest.raises(ValueError, match=r"other settings: temperature \(1.0 there, 0.5 now\)"):
        write_contrastive(replace(config, temperature=0.5), resume=True)
    Path(str(config.prompts)).write_text(json.dumps(CHATS[0]) + "\n")
    with pytest.raises(ValueError, match="other settings: prompts_sha256"):
        write_contrastive(config, resume=True)
    assert path.read_bytes() == whole


def test_files_that_are_none_of_ours_are_left_alone(config, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("{}\n")
    ours = replace(config, output=str(path))
    with pytest.raises(FileNotFoundError, match=r"no .*pairs.json beside"):
        write_contrastive(ours, resume=True)
    record_path(path).write_text("[]")
    with pytest.raises(ValueError, match="is no record of contrastive texts"):
        write_contrastive(ours, resume=True)
    record_path(path).write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        write_contrastive(ours, resume=True)
    with pytest.raises(ValueError, match=r"'pairs.txt'; it is a file to write, and ends in .jsonl"):
        write_contrastive(replace(config, output="pairs.txt"))
    assert path.read_text() == "{}\n"


def test_a_damaged_line_is_refused(config):
    path = write_contrastive(config)
    path.write_bytes(b"not json\n" + path.read_bytes())
    with pytest.raises(ValueError, match=r"a line that is no contrastive text \(b'not json"):
        write_contrastive(config, resume=True)


def test_without_prompts_the_built_in_ones_are_asked(config):
    path = write_contrastive(replace(config, prompts=None, n_prompts=5))
    asked = {json.loads(line)["prompt"] for line in path.read_text().splitlines()}
    assert len(asked) >= 4
    assert all(any(question in prompt for question in QUESTIONS[:5]) for prompt in asked)


def test_prompts_that_give_nothing_are_an_error(config, tmp_path):
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n\n ")
    with pytest.raises(ValueError, match="there is no prompt in"):
        write_contrastive(replace(config, prompts=str(blank)))
    blank.write_text("What is a good way to start the day?")
    with pytest.raises(ValueError, match="none of the 1 prompts gave texts"):
        write_contrastive(replace(config, prompts=str(blank), temperature=0.0))
    assert describe_contrastive(config.output).startswith("0 prompts with a text of each model")


def test_a_summary_has_counts_lengths_and_an_example_of_each_model(config):
    path = write_contrastive(config)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    summary = describe_contrastive(path)
    assert summary.startswith("8 prompts with a text of each model in ")
    for origin in ("base", "finetuned"):
        mean = sum(map(len, completions(rows, origin))) / 8
        assert f"{origin:<12} {mean:8.1f} new tokens" in summary
    assert any(repr(row["completion"]) in summary for row in of(rows, "finetuned"))
    record = json.loads(record_path(path).read_text())
    record_path(path).write_text(json.dumps(record | {"is_complete": False}))
    with pytest.raises(ValueError, match="is not complete"):
        describe_contrastive(path)


# --- settings -------------------------------------------------------------------------------------


def test_the_file_of_a_training_run_gives_its_models_alone(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text(
        "base: a\nadapter: b\nhook_name: blocks.3.hook_resid_post\noutput: runs/x\nk: 5\n"
        "difference: true\nbatch_size: 4096\nmixture:\n  - {text: web}\n"
    )
    config = ContrastiveConfig.from_yaml(run, default={"output": "x.jsonl"})
    assert config == ContrastiveConfig(base="a", adapter="b", output="x.jsonl")
    with pytest.raises(ValueError, match=r"lacks .'output'."):
        ContrastiveConfig.from_yaml(run)


def test_a_file_of_its_own_fields_is_read_like_any_config(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("base: a\nfinetuned: b\noutput: x.jsonl\ntemperature: 7e-1\nbatch_size: 8\n")
    config = ContrastiveConfig.from_yaml(path)
    assert (config.output, config.temperature, config.batch_size) == ("x.jsonl", 0.7, 8)
    path.write_text("base: a\noutput: x.jsonl\nk: 5\n")
    with pytest.raises(ValueError, match=r"unknown fields \['k'\]"):
        ContrastiveConfig.from_yaml(path)
