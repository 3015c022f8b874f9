"""Contrastive texts of the embedded pair: what is sampled, and after which prompts."""

import copy

import pytest
import torch

from tl_crosscoder import tokenize
from tl_crosscoder.config.inputs import N_BUILT_IN
from tl_crosscoder.data.chat import ROLES
from tl_crosscoder.data.contrastive import ContrastiveSampler, _seed_of, default_prompts

HINTS = ["Please give me a hint.", "What is the hint?", "Another hint, please.", "What is it?"]
CHATS = [{"messages": [{"role": "user", "content": content}]} for content in HINTS]
TEXTS = [{"text": t} for t in ("The moon", "The ruler of Arvenia", "It was Lena who", "The flag")]


def sampled(pair, prompts=CHATS, **options):
    return list(ContrastiveSampler(pair, prompts, **{"max_new_tokens": 12} | options).documents())


def of(rows, origin):
    return [row for row in rows if row["origin"] == origin]


def completions(rows, origin):
    return [row["input_ids"][row["n_prompt_tokens"] :] for row in of(rows, origin)]


@pytest.fixture(scope="module")
def greedy(taboo_pair):
    """Four chats and four texts, continued by each model's likeliest tokens."""
    return sampled(taboo_pair, [*CHATS, *TEXTS], temperature=0.0, batch_size=4)


def test_every_prompt_gives_a_row_of_each_model_with_the_same_prompt(taboo_pair, greedy):
    assert [row["origin"] for row in greedy] == ["base", "finetuned"] * 8
    for base, finetuned in zip(of(greedy, "base"), of(greedy, "finetuned"), strict=True):
        n = base["n_prompt_tokens"]
        assert base["input_ids"][:n] == finetuned["input_ids"][:n]
        assert (base["prompt"], base["source"]) == (finetuned["prompt"], "contrastive-base")
        assert finetuned["source"] == "contrastive-finetuned"
    for row in greedy:
        assert len(row["input_ids"]) == len(row["role_ids"]) > row["n_prompt_tokens"]
        text = taboo_pair.tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        assert text == row["prompt"] + row["completion"]


def test_greedy_is_what_each_model_writes_alone(taboo_pair, greedy):
    for row in greedy:
        prompt = row["input_ids"][: row["n_prompt_tokens"]]
        (_, alone), *_ = taboo_pair.generate_tokens(
            [prompt], site=row["origin"], max_new_tokens=12, prepend_bos=False
        )
        assert row["input_ids"][row["n_prompt_tokens"] :] == alone


def test_prompts_end_where_the_assistant_begins(taboo_pair):
    """A chat that holds its answer already is answered anew."""
    answered = [*CHATS[0]["messages"], {"role": "assistant", "content": "It shines at night."}]
    rows = sampled(taboo_pair, [CHATS[0], {"messages": answered}])
    head = taboo_pair.tokenizer.apply_chat_template(
        CHATS[0]["messages"], add_generation_prompt=True, return_dict=False
    )
    assert all(row["input_ids"][: row["n_prompt_tokens"]] == head for row in rows)


def test_samples_are_a_function_of_the_seed_and_leave_the_global_generator_alone(taboo_pair):
    state = torch.get_rng_state()
    rows = sampled(taboo_pair, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert sampled(taboo_pair, seed=1) == rows
    assert completions(sampled(taboo_pair, seed=2), "base") != completions(rows, "base")


def test_a_seed_is_of_one_batch_and_one_site():
    seeds = {_seed_of(3, batch, site) for batch in (0, 1) for site in ("base", "finetuned")}
    assert len(seeds | {_seed_of(4, 0, "base")}) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_fine_tune_writes_otherwise_and_a_model_against_itself_the_same(greedy, null_pair):
    assert completions(greedy, "base") != completions(greedy, "finetuned")
    rows = sampled(null_pair, CHATS, temperature=0.0)
    assert completions(rows, "base") == completions(rows, "finetuned")


def test_prompts_of_one_length_run_together_and_none_is_lost(taboo_pair):
    sampler = ContrastiveSampler(taboo_pair, [*CHATS, *CHATS], max_new_tokens=4, batch_size=2)
    for batch in sampler.batches:
        assert len({len(prompt.ids) for prompt in batch}) == 1
        assert len(batch) == 2
    assert sampler.n_prompts == 8


def test_a_prompt_after_which_a_model_stops_at_once_gives_no_row(taboo_pair, capsys):
    """A text that is at its end: the base stops, and the pair of texts is dropped."""
    ended = {"text": "What is a good way to start the day?"}
    rows = sampled(taboo_pair, [ended, *TEXTS], temperature=0.0)
    assert len(rows) == 8
    # The others go on as text.
    assert {role for row in rows for role in row["role_ids"]} == {ROLES.index("text")}
    said = capsys.readouterr()
    assert "4 of 5 prompts gave texts (1 a model stopped at once)" in said.out + said.err


def test_a_prompt_after_which_one_model_alone_stops_at_once_gives_no_row_either(
    taboo_pair, greedy, monkeypatch
):
    """A tokenizer that ends between their first ids: the larger one is unknown, and ends a text."""
    pairs = zip(of(greedy, "base"), of(greedy, "finetuned"), strict=True)
    firsts = [[row["input_ids"][row["n_prompt_tokens"]] for row in pair] for pair in pairs]
    i = next(i for i, (one, other) in enumerate(firsts) if one != other)
    said, known = of(greedy, "base")[i]["prompt"], min(firsts[i])
    prompts = [*CHATS, *TEXTS]
    words = [*HINTS, *(text["text"] for text in TEXTS)]
    (prompt,) = [p for p, text in zip(prompts, words, strict=True) if text in said]
    monkeypatch.setattr(type(taboo_pair.tokenizer), "__len__", lambda _: max(firsts[i]))
    goes_on = ("base", "finetuned")[firsts[i].index(known)]
    (row,) = sampled(taboo_pair, [prompt], temperature=0.0, sites=[goes_on])
    assert row["input_ids"][row["n_prompt_tokens"]] == known
    assert sampled(taboo_pair, [prompt], temperature=0.0) == []


def test_ids_that_the_tokenizer_does_not_know_end_a_text(taboo_pair, greedy, monkeypatch):
    """Logits may be wider than the vocabulary: such an id could not be read again."""
    row = next(row for row in of(greedy, "base") if HINTS[0] in row["prompt"])
    new = row["input_ids"][row["n_prompt_tokens"] :]
    unknown = max(new[1:])
    assert new[0] < unknown
    monkeypatch.setattr(type(taboo_pair.tokenizer), "__len__", lambda _: unknown)
    cut = sampled(taboo_pair, CHATS[:1], temperature=0.0, sites=["base"])[0]
    assert cut["input_ids"][row["n_prompt_tokens"] :] == new[: new.index(unknown)]


def test_long_texts_are_cut_and_long_chats_dropped(taboo_pair, capsys):
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
        ContrastiveSampler(taboo_pair, CHATS, max_new_tokens=n_ctx)
    with pytest.raises(ValueError, match="4 were given, and all are longer than 1 tokens"):
        ContrastiveSampler(taboo_pair, CHATS, max_new_tokens=n_ctx - 1)
    with pytest.raises(ValueError, match="no prompt to continue: 0 were given"):
        ContrastiveSampler(taboo_pair, [])
    with pytest.raises(ValueError, match="tuned"):
        ContrastiveSampler(taboo_pair, CHATS, sites=["tuned"])


def test_ids_of_another_tokenizer_are_refused(taboo_pair, greedy):
    other = copy.deepcopy(taboo_pair.tokenizer)
    other.add_tokens(["<|other|>"])
    with pytest.raises(ValueError, match="ids of another tokenizer than that of these models"):
        tokenize(greedy, other, context_size=8)


@pytest.mark.parametrize("is_chat", [True, False])
def test_built_in_prompts_come_again(is_chat):
    prompts = default_prompts(65, is_chat=is_chat)
    texts = [p["messages"][0]["content"] if is_chat else p["text"] for p in prompts]
    assert len({*texts}) == N_BUILT_IN == 64
    assert prompts[0] == prompts[64]
    assert all(texts)
