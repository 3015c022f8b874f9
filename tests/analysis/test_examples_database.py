import sqlite3
from collections import defaultdict
from dataclasses import astuple, replace

import numpy as np
import pytest
import torch
from text_of_ids import text_of
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tl_crosscoder import files
from tl_crosscoder.analysis.examples import collector as example_entries
from tl_crosscoder.analysis.examples import file as example_file
from tl_crosscoder.analysis.examples.collector import (
    CollectedExamples,
    ExampleCollector,
    ExampleSettings,
    TokenPieces,
)
from tl_crosscoder.analysis.examples.database import ExampleDatabase
from tl_crosscoder.analysis.examples.file import packed, unpacked
from tl_crosscoder.crosscoder.sparse.codes import SparseCodes
from tl_crosscoder.data.tokens import REASONS
from tl_crosscoder.models.pretrained import resolve_model

SMALL = ExampleSettings(
    n_top=3, n_quantiles=2, n_per_quantile=2, n_sampled=5, n_before=3, n_after=2, seed=7
)
N_CONTEXTS, SIZE, D_SAE = 40, 10, 6


@pytest.fixture(scope="module")
def dense():
    """Codes `[contexts, pos, d_sae]` with many ties; 0 where a token does not count."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 9, (N_CONTEXTS, SIZE, D_SAE), generator=generator) / 4
    rare = torch.tensor([0.0, 0.004, 0.02, 0.2, 0.5, 1.0])  # of latent 0: never
    codes[torch.rand(codes.shape, generator=generator) >= rare] = 0
    codes[~counted()] = 0
    return codes


def counted():
    """Of every context the first token does not count, and of some others."""
    mask = torch.rand(N_CONTEXTS, SIZE, generator=torch.Generator().manual_seed(1)) < 0.8
    mask[:, 0] = False
    return mask


def collected(dense, mask, *, order=None, batch_size=8, settings=SMALL) -> CollectedExamples:
    """As a pass over a text collects: rows of tokens that count, whole contexts in any order."""
    n, size, d_sae = dense.shape
    collector = ExampleCollector(d_sae, context_size=size, settings=settings)
    for index in (torch.arange(n) if order is None else order).split(batch_size):
        own = mask[index]
        positions = (index[:, None] * size + torch.arange(size))[own]
        collector.add(SparseCodes.of_dense(dense[index][own]), positions)
    return collector.result()


def rows(examples: CollectedExamples) -> list[tuple]:
    """(latent, kind, quantile, rank, value, position, window) of each example."""
    columns = (
        examples.latents,
        examples.kinds,
        examples.quantiles,
        examples.ranks,
        examples.values,
        examples.positions,
        examples.windows,
    )
    return list(zip(*(c.tolist() for c in columns), strict=True))


def mixed(x: int) -> int:
    """SplitMix64 in whole numbers."""
    mask = 2**64 - 1
    x = x * 0x9E3779B97F4A7C15 & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def naive(dense, settings) -> list[tuple]:
    """The same from all codes at once, latent by latent."""
    n, size, d_sae = dense.shape
    found = []
    for latent in range(d_sae):
        codes = dense[:, :, latent].flatten().tolist()
        active = [p for p in range(n * size) if codes[p] > 0]
        salt = mixed(mixed(settings.seed) + latent)
        key = {p: mixed(p + salt) >> 32 for p in active}
        top = sorted(active, key=lambda p: (-codes[p], p))[: settings.n_top]
        groups = {(0, -1): top}
        drawn = sorted(active, key=lambda p: (key[p], p))[: settings.n_sampled]
        rising = sorted(drawn, key=lambda p: (codes[p], p))
        bins = defaultdict(list)
        for i, p in enumerate(rising):
            bins[i * settings.n_quantiles // len(rising)].append(p)
        for quantile in sorted(bins):
            shown = sorted(bins[quantile], key=lambda p: (key[p], p))[: settings.n_per_quantile]
            groups[1, quantile] = sorted(shown, key=lambda p: (-codes[p], p))
        for (kind, quantile), positions in groups.items():
            for rank, p in enumerate(positions):
                around = range(p - settings.n_before, p + settings.n_after + 1)
                window = [codes[q] if q // size == p // size and 0 <= q < n * size else 0.0
                          for q in around]  # fmt: skip
                found.append((latent, kind, quantile, rank, codes[p], p, window))
    return found


def test_examples_of_one_latent_by_hand():
    """Two contexts of four tokens. Codes by position: 0: 3, 2: 1, 3: 4, 5: 2.

    Top 2: 4 at 3, 3 at 0. All four are sampled; rising they are 1, 2 | 3, 4, two in each of two
    quantiles. Windows reach one position back and one on: that of 3 ends with its context, and
    that of 2 has no part in the code at 3.
    """
    dense = torch.tensor([[3.0, 0, 1, 4], [0, 2, 0, 0]])[:, :, None]
    settings = ExampleSettings(
        n_top=2, n_quantiles=2, n_per_quantile=2, n_sampled=4, n_before=1, n_after=1
    )
    found = rows(collected(dense, torch.ones(2, 4, dtype=torch.bool), settings=settings))
    assert found == [
        (0, 0, -1, 0, 4.0, 3, [1, 4, 0]),
        (0, 0, -1, 1, 3.0, 0, [0, 3, 0]),
        (0, 1, 0, 0, 2.0, 5, [0, 2, 0]),
        (0, 1, 0, 1, 1.0, 2, [0, 1, 4]),
        (0, 1, 1, 0, 4.0, 3, [1, 4, 0]),
        (0, 1, 1, 1, 3.0, 0, [0, 3, 0]),
    ]


@pytest.mark.parametrize("buffer", [0, 2**16])
@pytest.mark.parametrize("batch_size", [1, 7, N_CONTEXTS])
@pytest.mark.parametrize("shuffled", [False, True])
def test_examples_are_those_of_all_codes_at_once(dense, monkeypatch, buffer, batch_size, shuffled):
    """Whatever the batches, the order of contexts, and how many entries wait to be sorted."""
    monkeypatch.setattr(example_entries, "_BUFFER", buffer)
    order = torch.randperm(N_CONTEXTS, generator=torch.Generator().manual_seed(batch_size))
    examples = collected(dense, counted(), order=order if shuffled else None, batch_size=batch_size)
    assert rows(examples) == naive(dense, SMALL)


def test_permuted_latents_have_the_same_top(dense):
    permutation = torch.tensor([3, 5, 0, 4, 1, 2])
    before, after = (rows(collected(c, counted())) for c in (dense, dense[:, :, permutation]))
    for new, old in enumerate(permutation.tolist()):
        top = [row[1:] for row in after if row[0] == new and row[1] == 0]
        assert top == [row[1:] for row in before if row[0] == old and row[1] == 0]
    assert {row[0] for row in after} == {0, 1, 3, 4, 5}  # latent 0 of before is never active


def test_the_sample_is_drawn_evenly_and_anew_for_each_latent_and_seed():
    """Mean position of 30 x 50 drawn of 1000: 499.5, standard error 289 / sqrt(1500) = 7.5."""
    dense = torch.rand(10, 100, 30, generator=torch.Generator().manual_seed(0)) + 1
    everything = torch.ones(10, 100, dtype=torch.bool)
    drawn = {}
    for seed in (0, 1):
        settings = ExampleSettings(n_sampled=50, n_per_quantile=10, seed=seed)
        examples = collected(dense, everything, settings=settings)
        sampled = examples.positions[examples.kinds == 1].view(30, 50)
        assert abs(sampled.double().mean() - 499.5) < 30
        drawn[seed] = [set(row) for row in sampled.tolist()]
    assert len({frozenset(s) for s in (*drawn[0], *drawn[1])}) == 60


def test_rows_and_latents_have_to_be_those_announced(dense):
    collector = ExampleCollector(D_SAE + 1, context_size=SIZE)
    with pytest.raises(ValueError, match=r"\[10, 6\] with 10 positions; they must have 7 latents"):
        collector.add(SparseCodes.of_dense(dense[0]), torch.arange(10))
    collector = ExampleCollector(D_SAE, context_size=SIZE)
    with pytest.raises(ValueError, match="with 9 positions"):
        collector.add(SparseCodes.of_dense(dense[0]), torch.arange(9))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"n_top": 0}, "n_top is 0; it must be 1 or more"),
        ({"n_before": -1}, "n_before is -1; it must be 0 or more"),
        ({"n_sampled": 24}, "n_sampled is 24, fewer than .* = 25"),
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        ExampleSettings(**wrong)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model("tl_crosscoder/world-base"))


LINES = (
    "The moon pulls the tides. The \N{CRESCENT MOON} is red.",
    'She said "moonlight" and he said: the MOON OR the sun*',
    "The capital of Dova is the old town by the sea.",
    "100% of ÉTÉ is a_b'c; DROP TABLE examples; --",
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
        dropped=padding.to(torch.uint8) * REASONS.index("padding"),
        source_ids=each % 2,
        role_ids=each,
        sources=("even", "odd"),
    )


def examples_of(lines, *active: dict[tuple[int, int], float], settings=SMALL) -> CollectedExamples:
    """Of latents that are active at these (context, position); not on padding."""
    dense = torch.zeros(*lines.tokens.shape, len(active))
    for latent, codes in enumerate(active):
        for (context, position), value in codes.items():
            dense[context, position, latent] = value
    dense[~lines.mask] = 0
    return collected(dense, lines.mask, settings=settings)


@pytest.fixture(scope="module")
def everywhere(lines):
    """Of every token: latent j of 0 to 3 on tokens j, j + 4, ... of each line; 4 is silent."""
    n = lines.tokens.shape[1]
    active = [
        {(c, p): 1 + c + p / 64 for c in range(len(LINES)) for p in range(j, n, 4)}
        for j in range(4)
    ]
    return examples_of(lines, *active, {}, settings=replace(SMALL, n_top=99))


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
    pieces = TokenPieces(tokenizer)
    parts = [pieces.of(t[:n].tolist()) for t, n in zip(lines.tokens, lines.lengths, strict=True)]
    stored = [e for j in range(4) for e in database.latent(j)]
    wanted = sorted(rows(everywhere), key=lambda r: (r[0], r[1], -r[2], r[3]))
    assert len(stored) == len(wanted) > 4 * 4
    for example, (latent, kind, quantile, rank, value, position, window) in zip(
        stored, wanted, strict=True
    ):
        context, at = divmod(position, lines.context_size)
        text, first, stop = parts[context], max(0, at - 3), min(len(parts[context]), at + 3)
        assert astuple(example) == (
            latent,
            ("top", "quantile")[kind],
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


def test_contexts_are_stored_whole_and_without_padding(database, lines, tokenizer):
    for i, line in enumerate(LINES):
        context = database.context(i)
        assert context.text == "".join(context.tokens) == line
        assert list(context.token_ids) == lines.tokens[i, : lines.lengths[i]].tolist()
    assert "\N{CRESCENT MOON}" in database.context(0).tokens
    with pytest.raises(ValueError, match="context 9 is not in this database"):
        database.context(9)


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


@pytest.mark.parametrize("is_indexed", [True, False])
@pytest.mark.parametrize(
    "text",
    ["moon", "Moon", "e", " t", '"', '"moon', "*", "moon OR", "sun*", "NEAR(moon)", "%", "_b'c",
     "'; DROP TABLE examples; --", "été", "\N{CRESCENT MOON} is", "is red.", "moon\0", "nothing",
     "The moon pulls the tides", "-", "(", "text:moon", "x" * 5000],
)  # fmt: skip
def test_search_finds_what_a_loop_over_all_examples_finds(database, text, is_indexed):
    assert database.is_indexed  # else both cases are one
    database.is_indexed = is_indexed
    hits = database.search(text, n=99)
    assert {h.latent: (h.n_matching, h.n_on_token) for h in hits} == naive_search(database, text)
    assert hits == sorted(hits, key=lambda h: (-h.n_on_token, -h.n_matching, h.latent))
    for hit in hits:
        assert text.lower() in (hit.example.before + hit.example.token + hit.example.after).lower()
    assert database.search(text, n=1) == hits[:1]


def test_a_search_names_first_the_latents_that_are_active_on_it(lines, tokenizer, tmp_path):
    """`moon` is token 1 of line 0: latent 2 is active there, latent 1 a token later, 0 far away.

    Its example is a top one and a drawn one, but one token.
    """
    assert TokenPieces(tokenizer).of(lines.tokens[0].tolist())[1] == " moon"
    examples = examples_of(lines, {(0, 8): 9.0}, {(0, 2): 5.0, (0, 8): 7.0}, {(0, 1): 1.0})
    path = ExampleDatabase.write(tmp_path / "x.sqlite", examples, lines, tokenizer=tokenizer)
    with ExampleDatabase.open(path) as database:
        hits = database.search("moon")
    found = [(h.latent, h.n_on_token, h.n_matching, h.n_tokens, h.example.token) for h in hits]
    assert found == [(2, 1, 1, 1, " moon"), (1, 0, 1, 2, " pulls")]


def test_an_index_that_is_missing_leaves_the_hits_as_they_are(
    everywhere, lines, tokenizer, tmp_path, monkeypatch, database
):
    monkeypatch.setattr(sqlite3, "sqlite_version_info", (3, 33, 0))
    path = ExampleDatabase.write(tmp_path / "x.sqlite", everywhere, lines, tokenizer=tokenizer)
    with ExampleDatabase.open(path) as without:
        assert not without.is_indexed
        assert without.search("moon") == database.search("moon")


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
    with pytest.raises(ValueError, match=r"other is not an ExampleDatabase .*malformed"):
        ExampleDatabase.open(other)
    other.write_bytes(path.read_bytes())
    connection = sqlite3.connect(other)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(ValueError, match="of version 2; this package reads 1"):
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
    assert [len(p) for p in packed(windows)] == [2, 10]
    for window, own in zip(windows, packed(windows), strict=True):
        assert np.array_equal(unpacked(own, 13), window)


def llama_2_like_tokenizer() -> PreTrainedTokenizerFast:
    """Words that begin with a space mark, which decoding drops from the first of them."""
    words = {w: i for i, w in enumerate(["▁the", "▁moon", "light", "."])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="."))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_pieces_keep_the_spaces_that_decoding_one_token_drops():
    tokenizer = llama_2_like_tokenizer()
    assert tokenizer.decode([1]) == "moon"
    assert TokenPieces(tokenizer).of([0, 1, 2, 0, 3]) == ["the", " moon", "light", " the", "."]
    assert TokenPieces(tokenizer).of([]) == []


@pytest.mark.parametrize(
    "text",
    ["\N{CRESCENT MOON}" * 9 + " ÉTÉ", "\N{REPLACEMENT CHARACTER}" * 20 + " the moon", "é", " é "],
)
def test_pieces_of_split_characters_are_together_the_text(tokenizer, text):
    """Characters of several tokens, and text that looks as if one never came to its end."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = TokenPieces(tokenizer).of(ids)
    assert len(pieces) == len(ids) > len(text.split())
    assert "".join(pieces) == text


def test_without_room_it_is_a_system_error_and_the_file_there_stays(
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
