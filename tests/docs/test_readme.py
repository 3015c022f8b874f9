"""The README's Python runs as it stands, with names and sizes of the embedded pair in place."""

import re
from pathlib import Path

from sae_lens import SAE

from tl_crosscoder import load_documents
from tl_crosscoder.data.text import write_documents

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
IN_PLACE = {
    '("google/gemma-2-2b", "google/gemma-2-2b-it")': '("tl_crosscoder/world-base",)',
    '"device": "cuda", "dtype": "bfloat16"': '"adapter": "tl_crosscoder/taboo"',
    "blocks.13.": "blocks.2.",
    '"d_sae": 36_864, "k": 100, "n_tokens": 50_000_000, "batch_size": 4096': (
        '"d_sae": 96, "k": 9, "n_tokens": 9_000, "batch_size": 99'
    ),
    "latents=tuple(top.latents))": "latents=tuple(top.latents), n_prompts=4, n_random=3)",
    '"gemma.html")': '"gemma.html", n_latents=5)',
}


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for there, here in IN_PLACE.items():
        assert there in code
        code = code.replace(there, here)
    rows = load_documents("tl_crosscoder/taboo", max_documents=300)
    write_documents(tmp_path / "text.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "The run is kept in runs/gemma" in " ".join(capsys.readouterr().err.split())
    assert {"patching.json", "ablation_predictions.json"} <= {
        path.name for path in (tmp_path / "runs/gemma").iterdir()
    }
    assert "<!doctype html>" in (tmp_path / "gemma.html").read_text(encoding="utf-8").lower()
    assert SAE.load_from_disk("runs/gemma-saelens").cfg.architecture() == "jumprelu"


def test_what_the_readme_links_to_is_there():
    root = Path(__file__).parents[2]
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert "docs/images/report.png" in links
    assert [link for link in links if not (root / link).exists()] == []


def test_the_readme_has_no_placeholders():
    assert not re.findall(r"^[A-Z_]{6,}$", README, re.MULTILINE)
