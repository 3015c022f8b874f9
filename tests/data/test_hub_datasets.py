"""Datasets of the hub by name: asked of a server that answers as the hub does, and holds files."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The hub shows the card of a gated dataset, and the names of its files, to everyone.
GATED, GATED_WITH_CARD, SILENT = "org/gated", "org/gated-with-card", "org/silent"
N_LONG_FILES, N_LONG_ROWS = 40, 1_200
"""48,000 documents: a shuffled stream holds 10,000 before it gives the first."""


class Hub(BaseHTTPRequestHandler):
    """Answers with the statuses and headers of huggingface.co for the repositories in `root`."""

    protocol_version = "HTTP/1.1"
    root: ClassVar[Path]
    asked: ClassVar[list[tuple[str, str]]] = []
    """(repository or other host, path in it) of each request; the path of the API's is empty."""

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        is_api = url.path.startswith("/api/")
        # datasets, owner, name, then what is asked (tree, resolve), the revision and the path.
        parts = unquote(url.path).removeprefix("/api").split("/")[1:]
        repo, path = "/".join(parts[1:3]), "/".join(parts[5:])
        folder, has_token = self.root / repo, bool(self.headers["Authorization"])
        is_elsewhere = bool(url.netloc)  # we are everybody's proxy, so nothing leaves the machine
        self.asked.append((url.netloc or repo, "" if is_api else path))
        is_open = repo == GATED_WITH_CARD and (is_api or path == "README.md")
        if repo == SILENT:
            self.close_connection = True
        elif repo in (GATED, GATED_WITH_CARD) and not is_open:
            self.answer(403 if has_token else 401, code="GatedRepo")
        elif is_elsewhere or not folder.is_dir():
            self.answer(404 if has_token or is_elsewhere else 401, code="RepoNotFound")
        elif is_api and parts[3:4] == ["tree"]:
            is_recursive = parse_qs(url.query).get("recursive") == ["true"]
            found = (folder / path).rglob("*") if is_recursive else (folder / path).glob("*")
            entries = [self.entry(p, p.relative_to(folder).as_posix()) for p in sorted(found)]
            self.answer(200, entries) if entries else self.answer(404, code="EntryNotFound")
        elif is_api:
            self.answer(200, {"id": repo, "sha": COMMIT, "siblings": []})
        elif not (folder / path).is_file():
            self.answer(404, code="EntryNotFound")
        else:
            self.answer_with_file(folder / path)

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        self.asked.append((self.path, ""))
        self.answer(403)

    def entry(self, path: Path, name: str) -> dict:
        kind, size = ("directory", 0) if path.is_dir() else ("file", path.stat().st_size)
        return {"type": kind, "path": name, "size": size, "oid": COMMIT}

    def answer_with_file(self, path: Path) -> None:
        content, headers = path.read_bytes(), {"ETag": f'"{path.name}"', "Accept-Ranges": "bytes"}
        if not (span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")):
            return self.answer(200, content, **headers)
        start, end = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        return self.answer(206, content[start : end + 1], **headers)

    def answer(self, status: int, content=b"", *, code: str = "", **headers: str) -> None:
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        headers |= {"Content-Length": str(len(content)), "X-Repo-Commit": COMMIT}
        self.send_response(status)
        for name, value in (headers | ({"X-Error-Code": code} if code else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


ASK = """
import json, os, sys
from tl_crosscoder import TextSource, load_documents, tokenize_mixture
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
def endpoint(tmp_path_factory):
    """The address of a hub with a few repositories."""
    Hub.root = tmp_path_factory.mktemp("hub")
    root = Hub.root / "org"
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
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def said(endpoint, tmp_path_factory):
    """The answer to each question, of one process: the hub's address is read at import."""
    folder = tmp_path_factory.mktemp("home")
    write_text(folder / "local.jsonl", *(json.dumps({"text": t}) for t in stories("home", 40)))
    hub = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    proxies = {"HTTP_PROXY": endpoint, "HTTPS_PROXY": endpoint, "NO_PROXY": "127.0.0.1"}
    proxies |= {name.lower(): value for name, value in proxies.items()}
    is_ours = re.compile("HF_|HUGGING|TRANSFORMERS_OFFLINE|ALL_PROXY|all_proxy").match
    kept = {name: value for name, value in os.environ.items() if not is_ours(name)}
    done = subprocess.run(
        [sys.executable, "-c", ASK, str(folder / "local.jsonl")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env=kept | hub | proxies,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not [host for host, _ in Hub.asked if host.endswith(":443")]
    return json.loads(done.stdout)


def files_asked(repo: str) -> set[str]:
    return {path for name, path in Hub.asked if name == repo and path.endswith(".parquet")}


def test_rows_come_in_the_order_of_files_and_rows_or_of_a_seed(said):
    in_order, first, again, other = (
        [d["text"] for d in said[name]] for name in ("stories", "seed 1", "seed 1 again", "seed 2")
    )
    assert in_order == [*stories("Dova", 30), *stories("Mirn", 30)]
    assert {d["source"] for d in said["stories"]} == {"org/stories"}
    assert first == again
    assert len({tuple(order) for order in (in_order, first, other)}) == 3
    assert sorted(first) == sorted(other) == sorted(in_order)


def test_no_more_is_read_than_max_documents_and_a_seeded_stream_reads_file_by_file(said):
    """`IterableDataset.shuffle` reads ten at once, row by row, and sleeps 5 s at their end."""
    assert [d["text"] for d in said["first 3"]] == stories("Dova", 3)
    assert files_asked("org/first") == {"data/train-00000-of-00002.parquet"}
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
    assert said["wrong column"].startswith("ValueError: org/stories has no column 'story'")
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


def test_a_refusal_is_not_asked_again(said):
    # Two questions about the first two, without and with a token; of the last, one.
    for repo, n in {GATED: 2, "nobody/nothing": 2, SILENT: 1}.items():
        assert sum(name == repo for name, _ in Hub.asked) == n


def test_a_mixture_reads_no_more_of_a_dataset_than_it_needs(said):
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
    assert 9 <= len(files_asked("org/long")) <= 2 * 9 + 1 < N_LONG_FILES
