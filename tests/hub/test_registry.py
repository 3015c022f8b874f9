"""The registry: every row loads or says why not, and says what the dictionary itself says."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hub.hub_server import Repo
from sae_lens.loading import pretrained_saes_directory

from tl_crosscoder import Crosscoder
from tl_crosscoder.cli.hub import List
from tl_crosscoder.files import WEIGHTS_NAME
from tl_crosscoder.hub import registry
from tl_crosscoder.hub.loading import load_pretrained
from tl_crosscoder.hub.registry import (
    DICTIONARIES,
    REGISTRY_PATH,
    Entry,
    entries,
    find,
    markdown_table,
    terminal_table,
)
from tl_crosscoder.models.pretrained import PREFIX, pretrained_folder
from tl_crosscoder.run.run import COPIES, Run, opened_path

EMBEDDED = [e for e in entries() if e.is_embedded]
PAGE = Path(__file__).parents[2] / "docs/dictionaries/pretrained.md"


def name_of(entry: Entry) -> str:
    return f"{entry.release}/{entry.id}"


@pytest.mark.parametrize("entry", entries(), ids=name_of)
def test_every_row_loads_or_says_why_not(entry, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    if not entry.is_embedded:
        with pytest.raises(ValueError, match="not in the hub's cache, and HF_HUB_OFFLINE") as why:
            load_pretrained(entry.release, entry.id)
        assert entry.repo_id in str(why.value)
        assert entry.where == "hub"
        return
    crosscoder = Crosscoder.from_pretrained(entry.release, entry.id)
    assert (crosscoder.cfg.d_sae, entry.where) == (entry.d_sae, "embedded")
    assert tuple(replace(s, scale=1.0) for s in crosscoder.sites) == entry.as_sites()
    measured = json.loads((entry.folder / "analysis.json").read_text())["reconstruction"]
    fve = measured["fve"] | {"difference": measured["difference_fve"]}
    assert entry.fve == pytest.approx(fve, abs=5e-5)
    assert entry.l0 == pytest.approx(measured["l0"], abs=5e-3)
    assert entry.n_bytes == (entry.folder / WEIGHTS_NAME).stat().st_size


def test_both_organisms_have_both_presets():
    names = {(e.release, e.id) for e in EMBEDDED}
    organisms = ("tl_crosscoder-taboo", "tl_crosscoder-false-fact")
    assert names == {(o, p) for o in organisms for p in ("batchtopk", "delta")}
    folders = {p.name for p in DICTIONARIES.iterdir()}
    assert folders == {e.path for e in EMBEDDED}


def test_saelens_reads_the_registry_in_its_own_schema(monkeypatch, tmp_path):
    shutil.copy(REGISTRY_PATH, tmp_path / "pretrained_saes.yaml")
    monkeypatch.setattr(pretrained_saes_directory, "files", lambda _: tmp_path)
    theirs = pretrained_saes_directory.get_pretrained_saes_directory.__wrapped__()
    ours = {(e.release, e.id): e.path for e in entries()}
    read = {(r, id): path for r, look in theirs.items() for id, path in look.saes_map.items()}
    assert read == ours
    row = EMBEDDED[0]
    fve = theirs[row.release].expected_var_explained[row.id]
    assert fve == pytest.approx(min(v for n, v in row.fve.items() if n != "difference"))


def test_a_loaded_dictionary_has_the_dtype_and_folding_asked_for():
    name = EMBEDDED[0].release, EMBEDDED[0].id
    plain = Crosscoder.from_pretrained(*name)
    half = Crosscoder.from_pretrained(*name, dtype="bfloat16")
    assert (half.W_dec.dtype, half.cfg.dtype) == (torch.bfloat16, "bfloat16")
    folded = Crosscoder.from_pretrained(*name, fold_W_dec_norm=True)
    x = torch.randn(8, plain.cfg.d_in)
    torch.testing.assert_close(folded.encode(x), plain.encode(x) * plain.get_W_dec_norm())


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"nearest: 'tl_crosscoder-taboo', and not a repository"):
        find("tl_crosscoder-tabboo", "batchtopk")
    with pytest.raises(ValueError, match=r"nearest: 'batchtopk'.*tl-crosscoder list"):
        find("tl_crosscoder-taboo", "BatchTopK2")
    with pytest.raises(ValueError, match=r"'tl_crosscoder/taboo-batchtopk' is not a release"):
        find("tl_crosscoder/taboo-batchtopk", "batchtopk")
    assert find("org/name", "anything").repo_id == "org/name"


def test_a_folder_and_a_revision_of_what_is_embedded_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"Load it with Crosscoder\.load\('runs/gemma'\)"):
        Crosscoder.from_pretrained("./runs/gemma", "x")
    folder = EMBEDDED[0].folder
    with pytest.raises(ValueError, match="is a folder, not a release") as said:
        Crosscoder.from_pretrained(str(folder.parent), folder.name)
    assert f"Crosscoder.load({str(folder)!r})" in str(said.value)
    with pytest.raises(ValueError, match="comes with the package and has no revision 'v1'"):
        Crosscoder.from_pretrained(EMBEDDED[0].release, EMBEDDED[0].id, revision="v1")


def test_the_class_without_a_registry_names_what_to_import(monkeypatch):
    monkeypatch.setattr(Crosscoder, "pretrained_loader", None)
    with pytest.raises(ValueError, match="take Crosscoder from tl_crosscoder itself, or import"):
        Crosscoder.from_pretrained(EMBEDDED[0].release, EMBEDDED[0].id)


def test_a_row_of_another_library_is_converted(hub, monkeypatch, tmp_path):
    """Its `scales` are folded in: encoder times s, of the site."""
    torch.manual_seed(0)
    n_sites, d_model, d_sae = 2, 4, 8
    weights = {
        "W_enc": torch.randn(n_sites, d_model, d_sae),
        "W_dec": torch.randn(d_sae, n_sites, d_model),
        "b_enc": torch.randn(d_sae),
        "b_dec": torch.randn(n_sites, d_model),
    }
    torch.save(weights, tmp_path / "cc_weights.pt")
    repo = Repo(private=False, commits=[])
    cfg = {"d_in": d_model, "dict_size": d_sae, "n_models": 2, "enc_dtype": "fp32"}
    files = {"cc_weights.pt": (tmp_path / "cc_weights.pt").read_bytes()}
    files |= {"cfg.json": json.dumps(cfg).encode()}
    repo.commit({f"l14/{name}": data for name, data in files.items()})
    hub.repos["org/theirs"] = repo
    row = next(e for e in entries() if e.conversion_func == "ckkissane")
    sites = tuple({**s, "d_model": d_model} for s in row.sites)
    own = {"release": "theirs", "id": "l14", "path": "l14", "repo_id": "org/theirs"}
    entry = replace(row, **own, sites=sites, scales=(0.5, 0.25))
    monkeypatch.setattr(registry, "entries", lambda: (entry,))
    assert entry.where == "hub"
    crosscoder = Crosscoder.from_pretrained("theirs", "l14")
    assert entry.where == "cached"
    assert [s.model_name for s in crosscoder.sites] == ["google/gemma-2-2b", "google/gemma-2-2b-it"]
    assert torch.equal(crosscoder.encoder("base"), 0.5 * weights["W_enc"][0])
    assert torch.equal(crosscoder.encoder("finetuned"), 0.25 * weights["W_enc"][1])


def test_an_embedded_run_opens_as_a_copy(monkeypatch, tmp_path):
    """Once, with a held-out text beside it; nothing is written into the package."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tl_crosscoder.run.run._held_out_again", lambda _: [{"text": "hidden"}])
    name = Path(PREFIX + "taboo-batchtopk")
    before = {p: p.stat().st_mtime_ns for p in DICTIONARIES.rglob("*")}
    run = Run(path=name)
    assert run.path == Path(COPIES) / "taboo-batchtopk"
    assert opened_path(name) == run.path  # once, not again
    assert run.organism() == "taboo"
    assert [d["text"] for d in run.documents()] == ["hidden"]
    assert {p: p.stat().st_mtime_ns for p in DICTIONARIES.rglob("*")} == before
    (run.path / WEIGHTS_NAME).write_bytes(b"of another version")
    with pytest.raises(ValueError, match="but not of the one in this version of the package"):
        opened_path(name)
    with pytest.raises(FileNotFoundError, match="'tl_crosscoder/no-such' does not come"):
        opened_path(PREFIX + "no-such")


@pytest.mark.slow
def test_the_copy_has_the_text_it_was_measured_on(monkeypatch, tmp_path):
    """Token for token: its hash is the one in the record. 50 s, for 200,000 tokens are made."""
    monkeypatch.chdir(tmp_path)
    run = Run(path=Path(PREFIX + "taboo-batchtopk"))
    _, text = run.measured()
    bits = text.tokens.numpy().tobytes() + text.dropped.numpy().tobytes()
    assert hashlib.sha256(bits).hexdigest() == run.record["held_out"]["sha256"]


def test_the_tables_show_every_dictionary(capsys):
    List()()
    said = capsys.readouterr().out
    assert said.strip() == terminal_table(entries())
    assert all(e.release in said for e in entries())
    assert max(map(len, said.splitlines())) <= 100
    page = PAGE.read_text(encoding="utf-8")
    assert markdown_table(entries()) in page, "run benchmarks/embedded_dictionaries.py --table"


def test_a_registry_without_a_field_says_which(tmp_path):
    path = tmp_path / "registry.yaml"
    path.write_text("a:\n  model: m\n  saes: [{id: x, path: y}]\n")
    with pytest.raises(ValueError, match="has no 'repo_id'"):
        entries(path)


def test_what_is_embedded_is_small_and_names_no_folder():
    from tl_crosscoder.hub.secrets import findings

    paths = [p for p in pretrained_folder().rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in paths) < 45e6
    dictionaries = [p for p in paths if p.parent.parent.name == "dictionaries"]
    assert not [f for p in dictionaries for f in findings(p.name, p)]
