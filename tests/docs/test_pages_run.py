"""What pages show runs from top to bottom, on the embedded pair and with smaller sizes in place."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from pages import blocks, commands, run_python, text_of
from sae_lens import SAE

import tl_crosscoder
from tl_crosscoder import RunConfig, load_documents, preset
from tl_crosscoder.cli.main import main
from tl_crosscoder.data.text import write_documents
from tl_crosscoder.run.training import train

pytestmark = pytest.mark.slow
_CONTROLS = ["--n-prompts", "6", "--n-random", "2", "--n-matched", "1"]
SMALL = {
    "scan": ["--n-prompts", "4", "--max-documents", "200"],
    "train": ["--d-sae", "64", "--no-changes"],
    "changes": ["--n-prompts", "20", "--n-random", "3"],
    "harvest": ["--max-documents", "400"],
    "contrastive": ["--max-new-tokens", "16"],
    "null": ["--n-steps", "2", "--n-samples", "16"],
    "patch": ["--n-prompts", "6"],
    "ablate": _CONTROLS,
    "steer": _CONTROLS,
    "curves": [*_CONTROLS, "--sizes", "1", "3", "--orders", "attribution", "--methods", "pca"],
    "baselines": ["--n-prompts", "6", "--n-random", "2", "--strengths", "1", "--n-texts", "2"],
}
README = {
    '("google/gemma-2-2b", "google/gemma-2-2b-it")': '("tl_crosscoder/world-base",)',
    '"device": "cuda", "dtype": "bfloat16"': '"adapter": "tl_crosscoder/taboo"',
    "blocks.13.": "blocks.2.",
    '"d_sae": 36_864, "k": 100, "n_tokens": 50_000_000, "batch_size": 4096': (
        '"d_sae": 96, "k": 9, "n_tokens": 9_000, "batch_size": 99'
    ),
    "patching(latents=tuple(top.latents))": "patching(latents=tuple(top.latents), n_prompts=4)",
    "necessity(latents=tuple(top.latents))": (
        "necessity(latents=tuple(top.latents), n_prompts=4, n_random=3)"
    ),
    '"gemma.html")': '"gemma.html", n_latents=5)',
}


def run_commands(page: str) -> None:
    """A page's commands with fewer tokens; no run is made twice."""
    for arguments in commands(page):
        arguments = shlex.split(shlex.join(arguments).replace("500000", "6000"))
        verb = arguments[0]
        if verb != "train" or not Path(arguments[-1]).exists():
            small = SMALL.get(verb, [])
            if verb == "train" and "--text" in arguments:
                small = [*small, "--max-documents", "200"]
            assert main([*arguments, *small]) == 0, arguments


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pages run one after the other: with the run that the demo would leave, of fewer
    tokens and latents, and the file of questions that a page shows."""
    path = tmp_path_factory.mktemp("pages")
    (questions,) = blocks("docs/interventions.md", "jsonl")
    (path / "hints.jsonl").write_text(questions, encoding="utf-8")
    train(
        RunConfig(
            base="tl_crosscoder/world-base",
            adapter="tl_crosscoder/taboo",
            hook_name="blocks.2.hook_resid_post",
            text="tl_crosscoder/taboo",
            output=str(path / "demo-output/taboo"),
            d_sae=64,
            preset=preset("batchtopk", k=12),
            n_tokens=6_000,
            max_documents=300,
        )
    )
    return path


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    rows = load_documents("tl_crosscoder/taboo", max_documents=300)
    write_documents(tmp_path / "text.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    run_python("README.md", README)
    printed = capsys.readouterr()
    for shown in blocks("README.md", "text")[0].split("\n\n"):
        assert shown.strip() in printed.out
    assert "The run is kept in runs/gemma" in " ".join(printed.err.split())
    assert {"patching.json", "ablation_predictions.json"} <= {
        path.name for path in (tmp_path / "runs/gemma").iterdir()
    }
    assert "<!doctype html>" in (tmp_path / "gemma.html").read_text(encoding="utf-8").lower()
    assert SAE.load_from_disk("runs/gemma-saelens").cfg.architecture() == "jumprelu"


def test_the_page_on_data_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run_commands("docs/data.md")
    out = capsys.readouterr().out
    assert "Activations in cache" in out
    assert "finetuned-only" in out
    run_python("docs/data.md", {})
    assert "contrastive-base" in capsys.readouterr().out


def test_the_page_on_measures_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    run_commands("docs/measures.md")
    names = run_python("docs/measures.md", {})
    out = capsys.readouterr().out
    assert "Latent Scaling" in out
    assert "among their examples" in out
    assert (folder / "latents.parquet").is_file()
    listed = re.findall(r"^\| `([\w.]+\.\w+)` \|", text_of("docs/measures.md"), re.MULTILINE)
    assert len(listed) == 4
    assert [name for name in listed if not (folder / "runs/taboo" / name).is_file()] == []
    assert names["ranking"].latents == [row.latent for row in names["ranking"].rows]


def test_the_page_on_interventions_runs(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    run_commands("docs/interventions.md")
    names = run_python(
        "docs/interventions.md",
        {
            "n_random=100, n_matched=10": "n_random=3, n_matched=2",
            '"n_random": 9, "n_matched": 9': '"n_random": 2, "n_matched": 1, "methods": ("pca",)',
            "range(20)": "range(3)",
        },
    )
    assert "Necessity" in capsys.readouterr().out
    text = text_of("docs/interventions.md")
    page = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    variants = {row.variant.rstrip("0123456789 ") for row in names["result"].rows}
    explained = {f"fine-tuned stream {m}" for m in re.findall(r"`… (at [^`\n]+)`", page)}
    explained |= {m.rstrip("0123456789 ") for m in re.findall(r"`([^`\n]+)`", page)}
    assert variants - {"top"} <= explained  # `top 10` is the page's own set
    results = set(re.findall(r"`(\w+)\.json`", page))
    assert len(results) == 12
    missing = {n for n in results if not (folder / f"runs/taboo/{n}.json").is_file()}
    assert missing == {"layer_scan"}  # it is in the folder of `scan`


def test_the_page_on_extending_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_python(
        "docs/extending.md",
        {"200_000": "6_000", "max_documents=2_000": "max_documents=200", "d_sae=1024": "d_sae=64"},
    )
    found, codes = names["found"], names["crosscoder"]
    # By a loop over the rows of one context: the entries that continue one at the row before.
    (part,) = names["harvest"](names["pair"], names["held_out"][:1])
    active = codes.encode(part.rows) > 0
    one = names["runs"](names["pair"], codes, names["held_out"][:1])
    assert one.n_active.tolist() == active.sum(dim=0).tolist()
    assert one.n_continued.tolist() == (active[1:] & active[:-1]).sum(dim=0).tolist()
    assert found.n_active.sum() > one.n_active.sum()
    assert "loss/log_sum" in (tmp_path / "out/log-sum/metrics.jsonl").read_text()
    assert "Reconstruction(" in capsys.readouterr().out


def test_the_pages_on_seeing_and_sharing_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = run_python("docs/seeing.md", {})
    assert {"training", "relative_decoder_norm"} <= set(names["figures"])
    assert len(names["codes"].panels) == len(names["compared"].panels) == 1
    for arguments in commands("docs/sharing.md"):
        if arguments[0] == "export":
            assert main(arguments) == 0
    # In place of what `import` would fetch.
    tl_crosscoder.Crosscoder.load("demo-output/taboo").save("imported/kissane")
    shutil.copy("demo-output/taboo/held_out.jsonl", "text.jsonl")
    run_python("docs/sharing.md", {"context_size=1024": "context_size=64"})
    assert Path("imported/kissane/analysis.safetensors").is_file()
    out = capsys.readouterr().out
    assert "JumpReLUSAE 192" in out
    assert "Give me a hint." in out


def test_the_page_on_the_benchmark_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = run_python("docs/benchmark.md", {})["folder"]
    (cell,) = json.loads((folder / "taboo.json").read_text(encoding="utf-8"))["cells"]
    assert cell["method"] == "mine"
    assert "failed" not in cell
    assert any(row["share"] for row in cell["rows"])
