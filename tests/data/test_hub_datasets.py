"""Datasets of the hub by name: asked of a server that answers as the hub does, and holds files."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from models.disk_hub import DiskHub

N_LONG_FILES, N_LONG_ROWS = 40, 1_200
"""48,000 documents: a shuffled stream holds 10,000 before it gives the first."""

ASK = """
import json, os, sys
from tl_crosscoder import TextSource, load_documents
from tl_crosscoder.data.mixture import tokenize_mixture
from tl_crosscoder.data.documents import stream_documents

LOCAL = sys.argv[1]

def streamed(name, *, seed=None, **fields):
    return list(stream_documents(TextSource(text=name, **fields), seed=seed))

def message(name, *, token=None, **fields):
    os.environ.pop("HF_TOKEN", None)
    os.environ |= {"HF_TOKEN": token} if token else {}
    try:
        streamed(name, **fields)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def mixture():
    from transformers import AutoTokenizer

    mixed = tokenize_mixture(
        [TextSource(text="org/long", weight=3, name="hub"), TextSource(text=LOCAL, name="local")],
        AutoTokenizer.from_pretrained("pretrained/models/world-base"),
        context_size=32,
        n_tokens=6_000,
        n_held_out_tokens=600,
    )
    held_out = [d["source"] for d in mixed.held_out_documents]
    return mixed.training.source_counts, mixed.n_passes, held_out

chats = {"text_column": "conversation", "dataset_config": "de"}
said = {
    "stories": streamed("org/stories"),
    "seed 1": streamed("org/stories", seed=1),
    "seed 1 again": streamed("org/stories", seed=1),
    "seed 2": streamed("org/stories", seed=2),
    "test split": streamed("org/stories", dataset_split="test"),
    "first 3": load_documents("org/first", max_documents=3),
    "some 10": streamed("org/some", seed=1, max_documents=10),
    "chats": streamed("org/chats", **chats),
    "test chats": streamed("org/chats", **chats, dataset_split="test"),
    "no config": message("org/chats"),
    "wrong config": message("org/chats", dataset_config="fr"),
    "wrong split": message("org/stories", dataset_split="validation"),
    "wrong column": message("org/stories", text_column="story"),
    "not found": message("nobody/nothing"),
    "not found, a token": message("nobody/nothing", token="hf_test"),
    "gated": message("org/gated"),
    "gated, a token": message("org/gated", token="hf_test"),
    "gated, with a card": message("org/gated-with-card"),
    "script": message("org/script"),
    "no data": message("org/empty"),
    "no answer": message("org/silent"),
    "mixture": mixture(),
}
json.dump(said, sys.stdout)
"""


def stories(part: str, n: int) -> list[str]:
    return [f"The {i} boats of {part} went down to the sea." for i in range(n)]


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": "Dova."}]


def write_parquet(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts)))}), path)


def write_text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A hub with a few repositories."""
    root = tmp_path_factory.mktemp("hub") / "org"
    for name in ("stories", "first", "some"):
        for i, part in enumerate(("Dova", "Mirn")):
            write_parquet(root / name / f"data/train-0000{i}-of-00002.parquet", stories(part, 30))
        write_parquet(root / name / "data/test-00000-of-00001.parquet", stories("Ost", 5))
    for i in range(N_LONG_FILES):
        path = root / f"long/data/train-{i:05}-of-{N_LONG_FILES:05}.parquet"
        write_parquet(path, stories(f"the port {i}", N_LONG_ROWS))
    configs = []
    for language in ("en", "de"):
        files = [{"split": s, "path": f"{language}/{s}.jsonl"} for s in ("train", "test")]
        for file in files:
            rows = [{"conversation": chat(f"{language} {file['split']} {i}?")} for i in range(4)]
            write_text(root / "chats" / file["path"], *map(json.dumps, rows))
        configs.append({"config_name": language, "data_files": files})
    # JSON is YAML.
    write_text(root / "chats/README.md", "---", f"configs: {json.dumps(configs)}", "---", "Chats.")
    for name in ("script/script.py", "empty/README.md", "gated-with-card/README.md"):
        write_text(root / name, "pass")
    with DiskHub(root=root.parent).running() as hub:
        yield hub


@pytest.fixture(scope="module")
def said(hub, tmp_path_factory):
    """The answer to each question."""
    folder = tmp_path_factory.mktemp("home")
    write_text(folder / "local.jsonl", *(json.dumps({"text": t}) for t in stories("home", 40)))
    return hub.answers(ASK, folder, folder / "local.jsonl")


def files_asked(hub: DiskHub, repo: str) -> set[str]:
    return {path for name, path in hub.asked if name == repo and path.endswith(".parquet")}


def test_rows_come_in_the_order_of_files_and_rows_or_of_a_seed(said):
    in_order, first, again, other = (
        [d["text"] for d in said[name]] for name in ("stories", "seed 1", "seed 1 again", "seed 2")
    )
    assert in_order == [*stories("Dova", 30), *stories("Mirn", 30)]
    assert {d["source"] for d in said["stories"]} == {"org/stories"}
    assert first == again
    assert len({tuple(order) for order in (in_order, first, other)}) == 3
    assert sorted(first) == sorted(other) == sorted(in_order)


def test_no_more_is_read_than_max_documents_and_a_seeded_stream_reads_file_by_file(said, hub):
    """`IterableDataset.shuffle` reads ten at once, row by row, and sleeps 5 s at their end."""
    assert [d["text"] for d in said["first 3"]] == stories("Dova", 3)
    assert files_asked(hub, "org/first") == {"data/train-00000-of-00002.parquet"}
    n_from = [sum(part in d["text"] for d in said["some 10"]) for part in ("Dova", "Mirn")]
    assert sorted(n_from) == [0, 10]


def test_splits_and_configs_are_chosen_by_name(said):
    assert [d["text"] for d in said["test split"]] == stories("Ost", 5)
    for split, documents in {"train": said["chats"], "test": said["test chats"]}.items():
        assert [d["messages"] for d in documents] == [chat(f"de {split} {i}?") for i in range(4)]


def test_a_config_split_or_column_that_does_not_exist_is_answered_with_those_that_do(said):
    assert "available configs: ['en', 'de']" in said["no config"]
    assert "BuilderConfig 'fr' not found. Available: ['en', 'de']" in said["wrong config"]
    assert "Bad split: validation. Available splits: ['train', 'test']" in said["wrong split"]
    said_of_column = (
        "ValueError: document 1 of org/stories cannot be read: it has no column 'story'"
    )
    assert said["wrong column"].startswith(said_of_column)
    assert "it has ['id', 'text']" in said["wrong column"]


@pytest.mark.parametrize(
    ("case", "why"),
    {
        "no config": "Config name is missing.",
        "wrong config": "BuilderConfig 'fr' not found.",
        "wrong split": "Bad split: validation.",
        "not found": "Dataset 'nobody/nothing' doesn't exist on the Hub or cannot be accessed.",
        "not found, a token": "doesn't exist on the Hub or cannot be accessed.",
        "gated": "is a gated dataset on the Hub. You must be authenticated to access it.",
        "gated, a token": "/datasets/org/gated to ask for access.",
        "gated, with a card": "is a gated dataset on the Hub. You must be authenticated",
        "script": "Dataset scripts are no longer supported, but found script.py",
        "no data": "doesn't contain any data files",
        "no answer": "Server disconnected without sending a response.",
    }.items(),
)
def test_what_the_hub_does_not_give_is_said_with_the_next_step(said, case, why):
    assert re.match(r"FileNotFoundError: '\w+/[\w-]+' is neither a file nor a folder", said[case])
    assert why in said[case]
    assert "\n" not in said[case]
    assert said[case].endswith("a gated dataset needs `hf auth login`.")


def test_a_refusal_is_not_asked_again(said, hub):
    # Two questions about the first two, without and with a token; of the last, one.
    for repo, n in {"org/gated": 2, "nobody/nothing": 2, "org/silent": 1}.items():
        assert sum(name == repo for name, _ in hub.asked) == n


def test_a_mixture_reads_no_more_of_a_dataset_than_it_needs(said, hub):
    counts, n_passes, held_out = said["mixture"]
    assert sum(counts.values()) >= 6_000
    # A document or two of about 16 tokens, of 6,000.
    assert counts["hub"] / sum(counts.values()) == pytest.approx(0.75, abs=0.01)
    assert n_passes["hub"] == 1
    # 40 documents of about 16 tokens, 9 in 10 of them for training, for 1,500 tokens.
    assert n_passes["local"] >= 2
    assert set(held_out) == {"hub", "local"}
    # The held-out side and the other each shuffle 10,000 documents and read some 300 more, which
    # are 9 files of 1,200; the first file tells the columns.
    assert 9 <= len(files_asked(hub, "org/long")) <= 2 * 9 + 1 < N_LONG_FILES
