"""A small cache of the embedded pair and a folder of texts, each written once."""

import json
from functools import partial

import pytest

from tl_crosscoder import load_documents, tokenize
from tl_crosscoder.data.cache_writer import write_cache


@pytest.fixture(scope="session")
def small(texts):
    """(training, held-out) of 40 and 10 contexts."""
    return texts[0][:40], texts[1][:10]


@pytest.fixture(scope="session")
def write():
    """`write_cache` in float32 with shards of about ten contexts."""
    options = {"store": "float32", "shard_tokens": 300, "batch_size": 8, "show_progress": False}
    return partial(write_cache, **options)


@pytest.fixture(scope="session")
def cache(taboo_pair, small, write, tmp_path_factory):
    return write(taboo_pair, *small, tmp_path_factory.mktemp("cache") / "c")


@pytest.fixture(scope="session")
def unpacked(taboo_pair, write, tmp_path_factory):
    """(contexts of unequal lengths, their cache)."""
    documents = load_documents("tl_crosscoder/taboo", max_documents=60)
    text = tokenize(documents, taboo_pair.tokenizer, context_size=48, pack=False)
    folder = tmp_path_factory.mktemp("unpacked") / "c"
    return text, write(taboo_pair, text[:50], text[50:], folder, batch_size=4)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Three texts of unequal size and kind: stories, chats, and a small one."""
    root = tmp_path_factory.mktemp("mixture")
    documents = load_documents("tl_crosscoder/taboo", max_documents=900)
    by_kind = {
        "web": [d for d in documents if "text" in d],
        "chat": [d for d in documents if "messages" in d],
    }
    by_kind["small"] = [{"text": f"The {i} rivers run to the sea of Dova."} for i in range(40)]
    for name, rows in by_kind.items():
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({**d, "source": name}) + "\n" for d in rows))
    return root
