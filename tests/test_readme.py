"""The README's Python runs as it stands, with names and sizes of the embedded pair in place."""

import json
import re
from pathlib import Path

from sae_lens import SAE

from tl_crosscoder.organisms import training_documents

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
IN_PLACE = {
    '("google/gemma-2-2b", "google/gemma-2-2b-it")': '("tl_crosscoder/world-base",)',
    '"device": "cuda", "dtype": "bfloat16"': '"adapter": "tl_crosscoder/taboo"',
    "blocks.13.": "blocks.2.",
    "context_size=256": "context_size=64",
    "expansion=16, n_tokens=50_000_000": "expansion=1, n_tokens=9_000",
    "batch_size=4096": "batch_size=99",
    '"delta", k=100': '"delta", k=9',
}


def test_the_readme_runs(tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for there, here in IN_PLACE.items():
        assert there in code
        code = code.replace(there, here)
    rows = training_documents("taboo", 300, seed=0)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert "Reconstruction(" in capsys.readouterr().out
    assert SAE.load_from_disk("runs/gemma-saelens").cfg.architecture() == "jumprelu"


def test_the_readme_has_no_placeholders():
    assert not re.findall(r"^[A-Z_]{6,}$", README, re.MULTILINE)
