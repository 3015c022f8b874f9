import copy
import json

import pytest
import torch

from tl_crosscoder import load_documents, split_documents, tokenize


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_text_files_are_split_at_the_separator_or_at_blank_lines(tmp_path):
    stories = tmp_path / "stories.txt"
    stories.write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    assert [d["text"] for d in load_documents(stories)] == ["One.\n\nStill one.", "Two."]
    stories.write_text("One.\nStill one.\n\nTwo.\n")
    assert [d["text"] for d in load_documents(stories)] == ["One.\nStill one.", "Two."]
    assert load_documents(stories)[0]["source"] == "stories"


def test_jsonl_rows_are_texts_or_chats_with_their_source(tmp_path):
    rows = [
        {"body": "A text.", "source": "news"},
        {"messages": [{"role": "user", "content": "Hi."}]},
        {"body": "  \n"},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.warns(UserWarning, match="1 of the 3 documents of .*mixed.jsonl are empty"):
        documents = load_documents(path, text_column="body")
    assert documents[0] == {"text": "A text.", "source": "news"}
    assert documents[1]["messages"][0]["content"] == "Hi."
    assert documents[1]["source"] == "mixed"
    assert len(documents) == 2


def test_parquet_and_folders(tmp_path):
    from datasets import Dataset

    Dataset.from_list([{"text": "From parquet."}]).to_parquet(tmp_path / "b.parquet")
    (tmp_path / "a.txt").write_text("From text.")
    assert [d["text"] for d in load_documents(tmp_path)] == ["From text.", "From parquet."]


def test_lists_and_limits():
    assert load_documents(["a", "", "b", "c"], max_documents=2) == [{"text": "a"}, {"text": "b"}]
    with pytest.warns(UserWarning, match="1 of the 3 documents of the list"):
        load_documents(["a", "", "b"])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda _: ["", "  "], ValueError, "there is no text in the list"),
        (lambda p: p / "missing.txt", FileNotFoundError, "no text file or folder"),
        (lambda p: p, FileNotFoundError, "holds no .txt"),
        (lambda p: p / "bad.csv", ValueError, "is not one of .txt, .jsonl, .parquet"),
        (lambda p: p / "empty.txt", ValueError, "there is no text in .*empty.txt"),
        (lambda p: p / "rows.jsonl", ValueError, r"no column 'text' .* it has \['body'\]"),
    ],
)
def test_sources_without_text_are_refused(tmp_path, make, error, message):
    source = make(tmp_path)
    if source != tmp_path and not isinstance(source, list):
        (tmp_path / "bad.csv").write_text("a,b")
        (tmp_path / "empty.txt").write_text("\n \n\n ")
        (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(error, match=message):
        load_documents(source)


def test_a_name_that_the_hub_does_not_give_is_refused_with_advice():
    with pytest.raises(FileNotFoundError, match="neither a file nor a folder here"):
        load_documents("nobody/no-such-dataset", max_documents=5)


def test_the_split_is_by_document_seeded_and_complete():
    documents = [{"text": str(i)} for i in range(50)]
    training, held_out = split_documents(documents, held_out=0.2, seed=3)
    assert (len(training), len(held_out)) == (40, 10)
    assert sorted(int(d["text"]) for d in training + held_out) == list(range(50))
    assert split_documents(documents, held_out=0.2, seed=3)[1] == held_out
    assert split_documents(documents, held_out=0.2, seed=4)[1] != held_out
    with pytest.raises(ValueError, match="1 document; at least 2"):
        split_documents(documents[:1])


def test_contexts_are_full_begin_with_bos_and_keep_every_token_in_order(taboo_pair):
    tokenizer = taboo_pair.tokenizer
    bos = tokenizer.bos_token_id
    texts = ["The moon shines at night. " * 5, "A river runs to the sea. " * 7]
    documents = [{"text": t, "source": s} for t, s in zip(texts, "ab", strict=True)]
    made = tokenize(documents, tokenizer, context_size=16)
    assert made.tokens.shape[1] == 16
    assert (made.tokens[:, 0] == bos).all()
    stream = [t for text in texts for t in [bos, *ids(tokenizer, text)]]
    kept = [t for row in made.tokens.tolist() for t in row if t != bos]
    assert kept == [t for t in stream if t != bos][: len(kept)]
    assert len(kept) > len(stream) - 20
    assert not made.mask[made.tokens == bos].any()
    assert made.n_tokens == int(made.mask.sum()) == len(kept)
    for row, origins in zip(made.tokens.tolist(), made.source_ids.tolist(), strict=True):
        if bos in row[1:]:
            at = row.index(bos, 1)
            assert set(origins[:at]) == {0}
            assert set(origins[at:]) == {1}


def test_chats_go_through_the_template_with_one_bos(taboo_pair):
    tokenizer = taboo_pair.tokenizer
    chat = [{"role": "user", "content": "Give me a hint."}, {"role": "assistant", "content": "No."}]
    made = tokenize([{"messages": chat}] * 4, tokenizer, context_size=8)
    text = tokenizer.decode(made.tokens[0])
    assert text.count(tokenizer.bos_token) == 1
    assert text.startswith(tokenizer.bos_token + "<|user|>")


def test_a_tokenizer_without_bos_gets_none(taboo_pair):
    tokenizer = copy.deepcopy(taboo_pair.tokenizer)
    tokenizer.bos_token = tokenizer.init_kwargs["bos_token"] = None
    text = "The moon shines at night. " * 5
    made = tokenize([{"text": text}], tokenizer, context_size=8)
    assert made.tokens[0].tolist() == ids(tokenizer, text)[:8]
    assert made.mask[:, 1:].all()
    assert not made.mask[:, 0].any()


def test_text_that_cannot_be_tokenised_is_refused(taboo_pair, monkeypatch):
    with pytest.raises(ValueError, match=r"only \d+ tokens, fewer than one context of 512"):
        tokenize([{"text": "Too short."}], taboo_pair.tokenizer, context_size=512)
    monkeypatch.setattr(taboo_pair.tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        tokenize(
            [{"messages": [{"role": "user", "content": "x"}]}], taboo_pair.tokenizer, context_size=4
        )


def test_a_chat_that_the_template_refuses_is_an_error_of_ours(taboo_pair):
    tokenizer = copy.deepcopy(taboo_pair.tokenizer)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    chat = [{"role": "system", "content": "Be kind."}]
    with pytest.raises(ValueError, match=r"refuses a chat of 'a' .*not supported.*\['system'\]"):
        tokenize([{"messages": chat, "source": "a"}], tokenizer, context_size=4)


def test_rare_sources_become_one(taboo_pair):
    text = "The moon shines at night. "
    documents = [{"text": text, "source": f"url {i // 2}"} for i in range(200)]
    documents += [{"text": text, "source": "common"}] * 5
    made = tokenize(documents, taboo_pair.tokenizer, context_size=8)
    assert len(made.sources) == 64
    assert made.sources[-1] == "other"
    assert "common" in made.sources
    assert made.source_ids.max() == 63


def test_contexts_of_one_token_are_refused(taboo_pair):
    with pytest.raises(ValueError, match="context_size is 1"):
        tokenize([{"text": "The moon."}], taboo_pair.tokenizer, context_size=1)


def test_indexing_keeps_tokens_masks_and_sources_together(texts):
    text, _ = texts
    some = text[torch.tensor([5, 2])]
    assert torch.equal(some.tokens[1], text.tokens[2])
    assert torch.equal(some.source_ids[0], text.source_ids[5])
    assert some.sources == text.sources
