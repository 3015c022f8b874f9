"""Documents from every kind of source, and which of them are held out."""

import gzip
import json
import lzma
import math
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from tl_crosscoder import TextSource, load_documents, split_documents
from tl_crosscoder.data.documents import (
    content_hash,
    halves,
    is_held_out,
    lowest_hashes,
    stream_documents,
)
from tl_crosscoder.data.records import as_document


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


CHAT = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes."}]
SHARE_GPT = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Yes."}]


def renamed(*roles):
    return [{"role": r, "content": m["content"]} for r, m in zip(roles, CHAT, strict=True)]


@pytest.mark.parametrize(
    ("record", "document"),
    [
        ({"conversations": SHARE_GPT}, {"messages": CHAT}),
        ({"messages": renamed("Human", "model")}, {"messages": CHAT}),
        ({"messages": renamed("ipython", "function")}, {"messages": renamed("tool", "tool")}),
        ({"messages": json.dumps(CHAT), "text": math.nan}, {"messages": CHAT}),
        ({"messages": math.nan, "text": "a", "source": math.nan}, {"text": "a"}),
        ({"messages": np.array(CHAT, dtype=object)}, {"messages": CHAT}),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, "i."]}]},
            {"messages": CHAT[:1]},
        ),
        ("a", {"text": "a"}),
        ({"text": None, "messages": None}, {"text": ""}),
        # Padding on either side: of five tokens the mask keeps the third and fourth.
        (
            {
                "input_ids": np.array([0, 0, 7, 8, 0]),
                "role_ids": [0, 0, 2, 3, 0],
                "attention_mask": [0, 0, 1, 1, 0],
                "labels": [-100, -100, 7, 8, -100],
                "n_prompt_tokens": 3,
            },
            {"input_ids": [7, 8], "role_ids": [2, 3], "n_prompt_tokens": 1},
        ),
        ({"input_ids": [7, 8], "attention_mask": [1, 1]}, {"input_ids": [7, 8]}),
    ],
)
def test_records_of_many_shapes_are_one_document(record, document):
    assert as_document(record) == document
    assert as_document(document) is document


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "it is None, neither a text nor an object"),
        (["a", "b"], "it is list .'a', 'b'., neither"),
        ({"text": ["a", "b"]}, "its 'text' is list .* which is not a text"),
        ({"text": 3.5}, "its 'text' is float 3.5"),
        ({"text": "a\ud800"}, "half a character .* at position 1"),
        ({"messages": renamed("user", "narrator")}, "the role 'narrator', which is not known; ren"),
        ({"messages": renamed("user", "template")}, "the role 'template', which is not known"),
        ({"messages": "user: Hi."}, "a string that is not JSON"),
        ({"messages": ["Hi."]}, "a message is 'Hi.'; it must have a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image'; only text"),
        ({"messages": [{"role": "user", "content": 3}]}, "content of a message is int 3"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, "attention_mask has 1 values"),
        ({"input_ids": [1, 2], "n_prompt_tokens": "1"}, "n_prompt_tokens is '1'; it must be a who"),
        ({"input_ids": [1, 2], "n_prompt_tokens": 3}, "at most that of its 2 input_ids"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "the role list .'user'., which is"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content of a message is dict"),
        (
            {"input_ids": [1, 2], "attention_mask": [1, 2]},
            r"attention_mask holds \[2\]; it must be 1",
        ),
    ],
)
def test_records_that_are_no_document_say_why(record, message):
    with pytest.raises(ValueError, match=message):
        as_document(record)


def test_padding_of_tokenised_rows_does_not_count_and_unused_columns_are_named(tmp_path):
    rows = [
        {"input_ids": [5, 6, 7, 0], "attention_mask": [1, 1, 1, 0], "labels": [-100, 6, 7, -100]},
        {"input_ids": [8, 0, 0, 0], "attention_mask": [1, 0, 0, 0], "labels": [8, 0, 0, 0]},
        {"input_ids": [0, 0, 0, 0], "attention_mask": [0, 0, 0, 0], "labels": [0, 0, 0, 0]},
    ]
    path = tmp_path / "ids.parquet"
    pd.DataFrame(rows).to_parquet(path)
    for source in (path, rows):
        with pytest.warns(UserWarning, match=r"columns|documents") as said:
            documents = load_documents(source)
        assert [d["input_ids"] for d in documents] == [[5, 6, 7], [8]]
        assert any("the columns ['labels']" in str(w.message) for w in said)
        assert any("1 of the 3 documents" in str(w.message) for w in said)


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "lines.json", "a.csv", "a.parquet"]
)
def test_every_format_gives_the_same_documents_and_reads_only_what_is_used(tmp_path, name):
    """Other columns may hold anything: here nothing for 3,000 rows, then a text and an object."""
    rows = [{"text": f"One\n{i}, caf\u00e9.", "meta": None} for i in range(3_000)]
    rows += [{"text": "Two.", "meta": "late"}, {"text": "Three.", "meta": '{"a": 1}'}]
    path = tmp_path / name
    lines = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows)
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".zst"):
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(lines.encode())
    elif name == "a.json":
        path.write_text(json.dumps({"version": 1, "data": rows}, indent=1))
    elif path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False, encoding="utf-8-sig")
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text(lines, encoding="utf-8")
    source = path.name.split(".")[0]
    assert load_documents(path) == [{"text": row["text"], "source": source} for row in rows]


def test_a_saved_dataset_is_read_by_split(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"text": ["a", "b"], "meta": [None, "x"]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "test": rows.select([1])}).save_to_disk(tmp_path / "two")
    assert [d["text"] for d in load_documents(tmp_path / "one")] == ["a", "b"]
    assert [d["text"] for d in load_documents(tmp_path / "two", dataset_split="test")] == ["b"]
    with pytest.raises(ValueError, match=r"splits \['test', 'train'\] and not 'dev'"):
        load_documents(tmp_path / "two", dataset_split="dev")


def test_a_mixed_folder_says_what_it_leaves_out(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffOne.\r\n \t\r\nTwo.\r\n", encoding="utf-8")
    for name in ("info.json", "b.csv", ".hidden.txt"):
        (tmp_path / name).write_text("{}")
    with pytest.warns(UserWarning, match=r"1 files are read, and not b.csv, info.json\."):
        documents = load_documents(tmp_path)
    assert [d["text"] for d in documents] == ["One.", "Two."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff", "a.txt is not UTF-8: its byte at offset 3 is 0xff"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', "at offset 24 is 0xe9"),
        ("a.jsonl", b"null\n" + b'{"text": "a"}\n', "document 1 of .* cannot be read: it is None"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "line 2 of .*a.jsonl is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 of .*a.jsonl is not JSON"),
        ("a.json", b'{"a": [1], "b": [2]}', "an object|a JSON object of .'a', 'b'., of which 2"),
        ("a.json", b"[1", "a.json is not JSON"),
        ("a.csv", b"text,b\nx,y,z,z\n", "a.csv is not CSV"),
        ("a.parquet", b"PAR1 and no more", "a.parquet is not a parquet file that can be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b"x" * 1000, mtime=0)[:-9],
            "a.jsonl.gz cannot be decompressed",
        ),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_documents(path)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.gz", "a.json", "a.csv.xz"])
def test_a_file_that_takes_more_memory_than_there_is_is_refused(tmp_path, name, monkeypatch):
    """The machine is a small one; the first number of a parquet file is what it claims itself."""
    path, text = tmp_path / name, "x" * 9_000
    if name == "a.parquet":
        pd.DataFrame({"text": [text]}).to_parquet(path)
    else:
        packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(packed(text.encode()))
    monkeypatch.setattr("tl_crosscoder.data.readers.memory_of", lambda _: 10_000)
    with pytest.raises(ValueError, match=r"GB or more at once, and this machine has"):
        load_documents(path)


def test_bad_documents_are_skipped_with_three_reasons_where_that_is_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": str(i)}) for i in range(5)]
    bad = ["null", "{", '{"text": 3}', '{"messages": [{"role": "narrator"}]}']
    path.write_text("\n".join([*bad, *good]))
    with pytest.warns(UserWarning, match="were left out") as said:
        documents = load_documents(path, on_bad_document="skip")
    assert len(documents) == 5
    (message,) = [str(w.message) for w in said]
    assert message.startswith(f"4 of the documents read of {path} were left out (the first reasons")
    assert message.count("cannot be read") == 3
    with pytest.raises(ValueError, match="document 1 of"):
        load_documents(path)


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
        (lambda p: p / "bad.doc", ValueError, "is not one of .txt, .jsonl, .parquet"),
        (lambda p: p / "empty.txt", ValueError, "there is no text in .*empty.txt"),
        (lambda p: p / "rows.jsonl", ValueError, r"no column 'text' .* it has \['body'\]"),
    ],
)
def test_sources_without_text_are_refused(tmp_path, make, error, message):
    source = make(tmp_path)
    if source != tmp_path and not isinstance(source, list):
        (tmp_path / "bad.doc").write_text("a,b")
        (tmp_path / "empty.txt").write_text("\n \n\n ")
        (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(error, match=message):
        load_documents(source)


def test_the_split_is_by_document_seeded_and_complete():
    documents = [{"text": f"{i:02}"} for i in range(50)]
    training, held_out = split_documents(documents, held_out=0.2, seed=3)
    assert (len(training), len(held_out)) == (40, 10)
    assert sorted(int(d["text"]) for d in training + held_out) == list(range(50))
    assert split_documents(documents, held_out=0.2, seed=3)[1] == held_out
    assert split_documents(documents, held_out=0.2, seed=4)[1] != held_out
    with pytest.raises(ValueError, match="1 document; at least 2"):
        split_documents(documents[:1])
    with pytest.raises(ValueError, match="1 different document; at least 2"):
        split_documents(documents[:1] * 5)


def test_equal_documents_are_on_one_side_and_the_share_is_kept():
    chats = [{"messages": [{"role": "user", "content": f"text {i}"}]} for i in range(40)]
    dated = [{"messages": [{**c["messages"][0], "id": i}]} for i, c in enumerate(chats)]
    texts = [{"text": f"text {i}", "source": "a"} for i in range(200)]
    again = [{"text": f"text {i} \n", "source": "b"} for i in range(100)]
    sides = split_documents([*chats, *dated, *texts, *again], held_out=0.1)
    hashes = [{content_hash(d) for d in side} for side in sides]
    assert not hashes[0] & hashes[1]
    assert sum(map(len, hashes)) == 240
    assert sum(map(len, sides)) == 380
    sizes = [sum(len(str(d.get("text") or d["messages"])) for d in side) for side in sides]
    assert sizes[1] / sum(sizes) == pytest.approx(0.1, abs=0.02)
    assert not any(
        "whole" in d["text"] for d in split_documents([{"text": "whole book" * 99}, *texts])[1]
    )


def test_which_hashes_are_held_out_by_hand():
    """Of 40 a quarter is 10: half of the 20 with hash 1 fits into that, and then none is left."""
    assert lowest_hashes([5, 1, 9, 1], [10] * 4, share=0.25) == [False, True, False, True]
    # Of 100 a tenth is 10: 60 / 2 is too much, 20 / 2 is not, and what is left is below 0.
    assert lowest_hashes([1, 2, 3], [60, 20, 20], share=0.1) == [False, True, False]
    # There is always one on either side, the smallest where none fits.
    assert lowest_hashes([1, 2], [50, 40], share=0.01) == [False, True]
    assert lowest_hashes([1, 2], [50, 40], share=0.99) == [True, False]


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


def test_halves_are_by_content_and_neither_is_empty():
    documents = [{"text": f"document {i}"} for i in range(200)]
    ranking, tests = halves(documents)
    assert 70 < len(ranking) < 130
    assert len(ranking) + len(tests) == 200
    # In another text, in another order and twice, a document is on the side where it was.
    again = halves([*documents[::-2], *documents[:50], {"text": "new", "source": "x"}])
    assert all(d in ranking for d in again[0] if d in documents)
    assert all(d in tests for d in again[1] if d in documents)
    for side in (ranking, tests):
        assert [len(half) for half in halves(side[:2])] == [1, 1]
    with pytest.raises(ValueError, match="the text has 1 different document"):
        halves([documents[0], dict(documents[0])])
