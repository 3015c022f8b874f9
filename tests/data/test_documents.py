"""Documents from every kind of source, and which of them are held out."""

import json
from collections import Counter

import pytest

from tl_crosscoder import TextSource, load_documents, split_documents
from tl_crosscoder.data.documents import is_held_out, stream_documents


def test_text_files_are_split_at_the_separator_or_at_blank_lines(tmp_path):
    stories = tmp_path / "stories.txt"
    stories.write_text("One.\n\nStill one.\n<|endoftext|>\nTwo.\n<|endoftext|>\n")
    assert [d["text"] for d in load_documents(stories)] == ["One.\n\nStill one.", "Two."]
    stories.write_text("One.\nStill one.\n\nTwo.\n")
    assert [d["text"] for d in load_documents(stories)] == ["One.\nStill one.", "Two."]
    assert load_documents(stories)[0]["source"] == "stories"


def test_jsonl_rows_are_texts_or_chats_with_their_source(tmp_path):
    chat = [{"role": "user", "content": "Hi."}]
    rows = [
        {"body": "A text.", "source": "news"},
        {"messages": chat},
        {"body": chat},
        {"body": "  \n"},
    ]
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.warns(UserWarning, match="1 of the 4 documents of .*mixed.jsonl are empty"):
        documents = load_documents(path, text_column="body")
    as_chat = {"messages": chat, "source": "mixed"}
    assert documents == [{"text": "A text.", "source": "news"}, as_chat, as_chat]


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


def test_the_split_is_by_document_seeded_and_complete():
    documents = [{"text": str(i)} for i in range(50)]
    training, held_out = split_documents(documents, held_out=0.2, seed=3)
    assert (len(training), len(held_out)) == (40, 10)
    assert sorted(int(d["text"]) for d in training + held_out) == list(range(50))
    assert split_documents(documents, held_out=0.2, seed=3)[1] == held_out
    assert split_documents(documents, held_out=0.2, seed=4)[1] != held_out
    with pytest.raises(ValueError, match="1 document; at least 2"):
        split_documents(documents[:1])


def test_about_the_share_is_held_out_and_duplicates_go_together():
    documents = [{"text": f"text {i}"} for i in range(2000)]
    n = sum(is_held_out(d, share=0.1) for d in documents)
    # Binomial: 200 and a standard deviation of 13.
    assert 150 < n < 250
    assert is_held_out({"text": "x", "source": "a"}, share=0.5) == is_held_out(
        {"text": "x", "source": "b"}, share=0.5
    )
    for i in range(50):
        texts = [{"input_ids": [i, i + 1, j], "n_prompt_tokens": 2} for j in (7, 8)]
        assert len({is_held_out(t, share=0.5) for t in texts}) == 1
    moved = [is_held_out(d, share=0.5, seed=s) for s in (0, 1) for d in documents[:100]]
    assert moved[:100] != moved[100:]


def test_a_stream_is_shuffled_as_a_whole_and_complete(folder):
    source = TextSource(text=str(folder / "web.jsonl"))
    plain, shuffled = ([d["text"] for d in stream_documents(source, seed=s)] for s in (None, 3))
    assert plain != shuffled
    assert Counter(plain) == Counter(shuffled)
    assert shuffled == [d["text"] for d in stream_documents(source, seed=3)]


def test_a_cut_source_can_be_named_and_has_the_same_documents_in_every_pass(folder):
    source = TextSource(text=str(folder), name="pretraining", max_documents=30)
    passes = [{json.dumps(d) for d in stream_documents(source, seed=s)} for s in (None, 1, 2)]
    assert passes[0] == passes[1] == passes[2]
    assert len(passes[0]) == 30
    assert {d["source"] for d in stream_documents(source)} == {"pretraining"}
