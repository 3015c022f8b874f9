import sqlite3
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from analysis.hand_made import collected_examples, example_rows
from text_of_ids import text_of
from transformers import AutoTokenizer

from tl_crosscoder import files
from tl_crosscoder.analysis import example_file
from tl_crosscoder.analysis.example_database import ExampleDatabase
from tl_crosscoder.analysis.examples import CollectedExamples, ExampleSettings
from tl_crosscoder.data.tokens import DROP_REASONS
from tl_crosscoder.models.pretrained import resolve_model
from tl_crosscoder.models.tokenizer import token_pieces

SETTINGS = ExampleSettings(
    n_top=99, n_quantiles=2, n_per_quantile=2, n_sampled=5, n_before=3, n_after=2, seed=7
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model("tl_crosscoder/world-base"))


LINES = (
    "The moon pulls the tides. The \N{CRESCENT MOON} is red.",
    'She said "moonlight" and he said: the MOON OR the sun*',
    "The capital of Dova is the old town by the sea.",
    "100% of ÉTÉ, \N{GREEK CAPITAL LETTER DELTA}\N{GREEK CAPITAL LETTER OMICRON}"
    "\N{GREEK CAPITAL LETTER SIGMA} is a_b'c; DROP TABLE examples; --",
)


@pytest.fixture(scope="module")
def lines(tokenizer):
    """One context a line, padded on the right, with a source and a role each."""
    ids = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in LINES]
    size = max(map(len, ids)) + 2
    text = text_of(
        torch.tensor([row + [tokenizer.eos_token_id] * (size - len(row)) for row in ids])
    )
    padding = torch.tensor([[i >= len(row) for i in range(size)] for row in ids])
    each = torch.arange(len(ids), dtype=torch.uint8)[:, None].expand(-1, size)
    return replace(
        text,
        dropped=padding.to(torch.uint8) * DROP_REASONS.index("padding"),
        source_ids=each % 2,
        role_ids=each,
        sources=("even", "odd"),
    )


def examples_of(lines, *active: dict[tuple[int, int], float]) -> CollectedExamples:
    """Latents are active at these (context, position); not on padding."""
    dense = torch.zeros(*lines.tokens.shape, len(active))
    for latent, codes in enumerate(active):
        for (context, position), value in codes.items():
            dense[context, position, latent] = value
    dense[~lines.mask] = 0
    return collected_examples(dense, lines.mask, settings=SETTINGS)


@pytest.fixture(scope="module")
def everywhere(lines):
    """Of every token: latent j of 0 to 3 on tokens j, j + 4, ... of each line; 4 is silent."""
    n = lines.tokens.shape[1]
    active = [
        {(c, p): 1 + c + p / 64 for c in range(len(LINES)) for p in range(j, n, 4)}
        for j in range(4)
    ]
    return examples_of(lines, *active, {})


@pytest.fixture(scope="module")
def path(everywhere, lines, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("a #?% folder") / "examples.sqlite"
    about = {"models": ["a", "b"], "fve": 0.5}
    return ExampleDatabase.write(path, everywhere, lines, tokenizer=tokenizer, about=about)


@pytest.fixture
def database(path):
    with ExampleDatabase.open(path) as database:
        yield database


def test_what_is_stored_is_what_was_collected(database, everywhere, lines, tokenizer):
    assert database.about == {"models": ["a", "b"], "fve": 0.5}
    assert (database.d_sae, database.settings.n_top) == (5, 99)
    assert database.latents() == [0, 1, 2, 3]
    assert database.latent(4) == []
    parts = [
        token_pieces(tokenizer, t[:n].tolist())
        for t, n in zip(lines.tokens, lines.lengths, strict=True)
    ]
    stored = [e for j in range(4) for e in database.latent(j)]
    wanted = sorted(example_rows(everywhere), key=lambda r: (r[0], r[1] >= 0, -r[1], r[2]))
    assert len(stored) == len(wanted) > 4 * 4
    for example, (latent, quantile, rank, value, position, window) in zip(
        stored, wanted, strict=True
    ):
        context, at = divmod(position, lines.context_size)
        text, first, stop = parts[context], max(0, at - 3), min(len(parts[context]), at + 3)
        assert astuple(example) == (
            latent,
            "top" if quantile < 0 else "quantile",
            None if quantile < 0 else quantile,
            rank,
            value,
            "".join(text[first:at]),
            text[at],
            "".join(text[at + 1 : stop]),
            tuple(text[first:stop]),
            tuple(window[first - at + 3 : stop - at + 3]),
            at - first,
            ("text", "system", "user", "assistant")[context],
            ("even", "odd")[context % 2],
            context,
            at,
        )
        assert example.activations[example.at] == value


def test_contexts_are_stored_whole_and_without_padding(database):
    stored = database._connection.execute("SELECT text FROM contexts ORDER BY id")
    assert [text for (text,) in stored] == [*LINES]


def test_a_database_knows_its_text(database, lines):
    assert database.is_of(lines)
    assert database.is_of(lines[[0, 1, 2, 3, 0]])
    changed = lines.tokens.clone()
    changed[2, 1] += 1
    for other in (lines[:2], lines[[1, 0, 2, 3]], replace(lines, tokens=changed)):
        assert not database.is_of(other)


def test_examples_by_kind_and_number_and_as_a_table(database):
    every = database.latent(1)
    assert database.latent(1, kind="top") == [e for e in every if e.kind == "top"]
    quantiles = database.latent(1, kind="quantile")
    assert [(e.quantile, e.rank) for e in quantiles] == [(1, 0), (1, 1), (0, 0), (0, 1)]
    assert database.latent(1, n=2) == every[:2]
    frame = database.to_frame(1)
    assert frame["token"].tolist() == [e.token for e in every]
    assert frame.attrs == database.about
    assert list(database.to_frame(4).columns) == list(frame.columns)


def naive_search(database, text):
    """Latent -> (tokens whose window has it, those that it lies on), case left aside."""
    found = {}
    for latent in database.latents():
        near, on_token = set(), set()
        for e in database.latent(latent):
            whole, place = e.before + e.token + e.after, (e.context, e.position)
            token = range(len(e.before), len(e.before) + max(1, len(e.token)))
            for start in range(len(whole) - len(text) + 1):
                if whole[start : start + len(text)].lower() == text.lower():
                    near.add(place)
                    if set(range(start, start + len(text))) & set(token):
                        on_token.add(place)
        if near:
            found[latent] = (len(near), len(on_token))
    return found


@pytest.mark.parametrize(
    "text",
    ["moon", "Moon", "e", " t", '"', '"moon', "*", "moon OR", "sun*", "NEAR(moon)", "%", "_b'c",
     "'; DROP TABLE examples; --", "été", "\N{CRESCENT MOON} is", "is red.", "moon\0", "nothing",
     "The moon pulls the tides", "-", "(", "text:moon", "x" * 5000, "\N{GREEK SMALL LETTER SIGMA}",
     "\N{GREEK CAPITAL LETTER DELTA}\N{GREEK CAPITAL LETTER OMICRON}", "i"],
)  # fmt: skip
def test_search_finds_what_a_loop_over_all_examples_finds(database, text):
    hits = database.search(text, n=99)
    assert {h.latent: (h.n_matching, h.n_on_token) for h in hits} == naive_search(database, text)
    assert hits == sorted(hits, key=lambda h: (-h.n_on_token, -h.n_matching, h.latent))
    for hit in hits:
        example = hit.example
        assert text.casefold() in (example.before + example.token + example.after).casefold()
    assert database.search(text, n=1) == hits[:1]


def test_a_search_names_first_the_latents_that_are_active_on_it(lines, tokenizer, tmp_path):
    """`moon` is token 1 of line 0: latent 2 is active there, latent 1 a token later, 0 far away.

    Its example is a top one and a drawn one, but one token.
    """
    assert token_pieces(tokenizer, lines.tokens[0].tolist())[1] == " moon"
    examples = examples_of(lines, {(0, 8): 9.0}, {(0, 2): 5.0, (0, 8): 7.0}, {(0, 1): 1.0})
    path = ExampleDatabase.write(tmp_path / "x.sqlite", examples, lines, tokenizer=tokenizer)
    with ExampleDatabase.open(path) as database:
        hits = database.search("moon")
    found = [(h.latent, h.n_on_token, h.n_matching, h.n_tokens, h.example.token) for h in hits]
    assert found == [(2, 1, 1, 1, " moon"), (1, 0, 1, 2, " pulls")]


def test_the_same_examples_make_the_same_bytes(path, everywhere, lines, tokenizer, tmp_path):
    about = {"models": ["a", "b"], "fve": 0.5}
    again = ExampleDatabase.write(
        tmp_path / "new" / "x.sqlite", everywhere, lines, tokenizer=tokenizer, about=about
    )
    assert again.read_bytes() == path.read_bytes()
    assert [p.name for p in again.parent.iterdir()] == ["x.sqlite"]


def test_a_database_without_examples_opens_and_is_empty(lines, tokenizer, tmp_path):
    path = ExampleDatabase.write(
        tmp_path / "x.sqlite", examples_of(lines, {}), lines, tokenizer=tokenizer
    )
    with ExampleDatabase.open(path) as database:
        assert database.latents() == database.latent(0) == database.search("moon") == []


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda d: d.latent(5), "latent 5 is not in this database: it has 5, 0 to 4"),
        (lambda d: d.latent(-1), "latent -1 is not"),
        (lambda d: d.latent(0, kind="best"), r"'best' is not known; examples are \['top', 'quant"),
        (lambda d: d.latent(0, n=-1), "n is -1"),
        (lambda d: d.search("moon", n=-1), "n is -1"),
        (lambda d: d.search(""), "the text to search is empty"),
    ],
)
def test_questions_without_an_answer_are_refused(database, ask, match):
    with pytest.raises(ValueError, match=match):
        ask(database)


def test_the_file_is_open_to_read_only(database):
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        database._connection.execute("DELETE FROM examples")


def test_files_that_are_no_database_are_refused(path, tmp_path):
    other = tmp_path / "other"
    with pytest.raises(FileNotFoundError, match="other is not there: write an ExampleDatabase"):
        ExampleDatabase.open(other)
    other.write_text("not a database at all, but a text of some length " * 50)
    with pytest.raises(ValueError, match="other is not an ExampleDatabase"):
        ExampleDatabase.open(other)
    other.unlink()
    connection = sqlite3.connect(other)
    connection.execute("CREATE TABLE examples (latent)")
    connection.close()
    with pytest.raises(ValueError, match="other is an SQLite file, but not an ExampleDatabase"):
        ExampleDatabase.open(other)
    other.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"other is not an ExampleDatabase.*malformed"):
        ExampleDatabase.open(other)
    other.write_bytes(path.read_bytes())
    connection = sqlite3.connect(other)
    connection.execute("PRAGMA user_version = 1")
    connection.close()
    with pytest.raises(ValueError, match="of version 1; this package reads 2"):
        ExampleDatabase.open(other)


VIEW = (
    "DROP TABLE contexts",
    "CREATE VIEW contexts AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n)"
    " SELECT i AS id, '' AS text, x'' AS token_ids, x'' AS piece_lengths FROM n",
)
WRONG = {
    "a view without end": (VIEW, "defines"),
    "another table": (("CREATE TABLE more (x)",), "defines"),
    "a trigger": (
        ("CREATE TRIGGER t AFTER INSERT ON meta BEGIN DELETE FROM examples; END",),
        "defines",
    ),
    "no meta": (("DELETE FROM meta",), "damaged"),
    "meta of another shape": (("UPDATE meta SET content = '[1]'",), "damaged"),
    "meta without end": (
        ("UPDATE meta SET content = printf('%.*c', 200000, '[')",),
        "damaged",
    ),
    "settings of another shape": (
        ("UPDATE meta SET content = json_set(content, '$.settings.n_top', 'x')",),
        "n_top is 'x'",
    ),
    "a huge value": (("UPDATE meta SET content = zeroblob(70000000)",), "too big|damaged"),
    "text of another kind": (("UPDATE contexts SET piece_lengths = 'abc'",), "damaged"),
    "a source that is not there": (("UPDATE examples SET source = 99",), "damaged"),
    "a position that is not there": (("UPDATE examples SET position = 10000",), "damaged"),
    "activations cut": (("UPDATE examples SET activations = x'FF'",), "damaged"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_file_from_anywhere_is_refused_with_a_sentence(path, tmp_path, what):
    statements, message = WRONG[what]
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())
    connection = sqlite3.connect(other)
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match=message), ExampleDatabase.open(other) as database:
        database.latent(0)


def test_a_changed_page_is_found(path, tmp_path):
    data = bytearray(path.read_bytes())
    for at in range(4096, len(data), 4096):
        data[at + 3 : at + 5] = b"\xff\xff"  # number of cells
    other = tmp_path / "other"
    other.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        ExampleDatabase.open(other)


def test_a_text_other_than_that_of_the_examples_is_refused(everywhere, lines, tokenizer, tmp_path):
    for other in (lines[:1], lines.cut(5)):
        with pytest.raises(ValueError, match="give the text that the examples were collected on"):
            ExampleDatabase.write(tmp_path / "x", everywhere, other, tokenizer=tokenizer)
    assert not [*tmp_path.iterdir()]


def test_a_window_survives_its_packing():
    """13 positions: a mask of two bytes, then 4 bytes for each of the two that are not 0."""
    windows = np.zeros((2, 13), dtype=np.float32)
    windows[1, [0, 12]] = 0.1, 3
    assert [len(p) for p in example_file._packed(windows)] == [2, 10]
    for window, own in zip(windows, example_file._packed(windows), strict=True):
        assert np.array_equal(example_file.unpacked(own, 13), window)


def test_without_space_it_is_a_system_error_and_the_file_there_stays(
    everywhere, lines, tokenizer, tmp_path, monkeypatch
):
    # A database that may not grow says the same as a full disk.
    path = tmp_path / "examples.sqlite"
    path.write_bytes(b"what was there")
    connect = sqlite3.connect

    def small(*args, **options):
        connection = connect(*args, **options)
        connection.execute("PRAGMA max_page_count = 2")
        return connection

    monkeypatch.setattr(example_file.sqlite3, "connect", small)
    with pytest.raises(OSError, match="could not be written: database or disk is full") as caught:
        ExampleDatabase.write(path, everywhere, lines, tokenizer=tokenizer)
    assert files.is_disk_full(caught.value)
    assert path.read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["examples.sqlite"]
