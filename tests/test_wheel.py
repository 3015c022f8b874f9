"""What users install: the wheel holds the embedded pair and finds it there."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import tl_crosscoder
from tl_crosscoder.models.pretrained import pretrained_folder, resolve_model
from tl_crosscoder.organisms.suite import load_suite
assert tl_crosscoder.__file__.startswith(sys.argv[1])
assert str(pretrained_folder()).startswith(sys.argv[1])
for entry in load_suite().values():
    if not entry.is_real:
        assert str(entry.base).startswith(sys.argv[1]), entry.base
        assert len(tl_crosscoder.load_documents(entry.text)) == 40_000
    weights = "adapter_model.safetensors" if entry.adapter else "model.safetensors"
    assert (entry.folder / weights).is_file()
    assert all(path.is_file() for path in entry.questions)
pair = tl_crosscoder.ModelPair.from_pretrained(
    "tl_crosscoder/world-base", adapter="tl_crosscoder/taboo", hook_name="blocks.1.hook_resid_post"
)
print(pair.sites[1].adapter)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    kinds = ["--wheel", "--sdist"]
    command = [sys.executable, "-m", "build", *kinds, "--no-isolation", "--outdir", folder, ROOT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_the_pair_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "tl_crosscoder/py.typed" in names
    assert "tl_crosscoder/organisms/suite.yaml" in names
    assert "tl_crosscoder/data/prompts/questions.txt" in names
    assert "tl_crosscoder/pretrained/models/world-base/model.safetensors" in names
    assert "tl_crosscoder/pretrained/texts/taboo.jsonl.xz" in names
    assert "tl_crosscoder/pretrained/questions/false-fact/other-facts.jsonl" in names
    assert not any("recipes" in n for n in names)
    assert all(n.startswith(("tl_crosscoder/", "tl_crosscoder-")) for n in names)
    assert wheel.stat().st_size < 35_000_000


def test_an_index_takes_both_files(wheel):
    built = sorted(wheel.parent.iterdir())
    assert [path.name.endswith((".tar.gz", ".whl")) for path in built] == [True, True]
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, built)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_embedded_pair_loads_from_an_unpacked_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "site")],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.stdout.strip() == "tl_crosscoder/taboo", done.stderr
