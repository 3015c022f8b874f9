import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tl_crosscoder import files


def content(root: Path) -> dict[str, str]:
    """Every file below `root`, hidden ones too."""
    return {str(p.relative_to(root)): p.read_text() for p in root.rglob("*") if p.is_file()}


def fill(folder: Path, **texts: str) -> Path:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


class Broken(Exception):
    pass


def write_half(path: Path, *, as_folder: bool):
    """Fail in the middle of writing."""
    with files.replacing(path) as temporary:
        if as_folder:
            fill(temporary, a="half")
        else:
            temporary.write_text("half")
        raise Broken


def test_a_file_takes_the_place_of_another(tmp_path):
    path = tmp_path / "note.txt"
    for text in ("old", "ünïcode"):
        files.write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_folders_above_a_file_are_made(tmp_path):
    files.write_text(tmp_path / "a" / "b" / "note.txt", "text")
    assert content(tmp_path) == {"a/b/note.txt": "text"}


def test_a_folder_takes_the_place_of_another_and_nothing_of_the_old_stays(tmp_path):
    fill(tmp_path / "run", a="old", b="old")
    with files.replacing(tmp_path / "run") as temporary:
        fill(temporary, b="new", c="new")
    assert content(tmp_path) == {"run/b": "new", "run/c": "new"}


def test_the_old_content_is_there_until_the_new_is_complete(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with files.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("as_folder", [False, True])
def test_an_error_while_writing_leaves_the_old_and_nothing_else(tmp_path, as_folder):
    path = tmp_path / "run"
    if as_folder:
        fill(path, a="old", b="old")
    else:
        path.write_text("old")
    before = content(tmp_path)
    with pytest.raises(Broken):
        write_half(path, as_folder=as_folder)
    assert content(tmp_path) == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("as_folder", [False, True])
def test_an_error_while_writing_something_new_leaves_nothing(tmp_path, as_folder):
    with pytest.raises(Broken):
        write_half(tmp_path / "run", as_folder=as_folder)
    assert list(tmp_path.iterdir()) == []


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path):
    fill(tmp_path / "run", a="old")
    with pytest.raises(OSError, match="run"):
        files.write_text(tmp_path / "run", "new")
    assert content(tmp_path) == {"run/a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_an_error_while_replacing_a_folder_puts_the_old_back(tmp_path, monkeypatch):
    fill(tmp_path / "run", a="old")
    rename = Path.replace

    def fails_for_the_new(self, target):
        if self.name.endswith(".tmp"):
            raise OSError("disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", fails_for_the_new)
    with pytest.raises(OSError, match="disk is gone"), files.replacing(tmp_path / "run") as new:
        fill(new, a="new")
    assert content(tmp_path) == {"run/a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_of_the_same_number_left_is_not_mixed_in(tmp_path):
    for end in ("tmp", "old"):
        fill(tmp_path / f".run.{os.getpid()}.tl_crosscoder.{end}", left="over")
    fill(tmp_path / "run", a="old")
    with files.replacing(tmp_path / "run") as temporary:
        fill(temporary, a="new")
    assert content(tmp_path) == {"run/a": "new"}


def test_a_path_in_the_home_folder_is_there(tmp_path, monkeypatch):
    """Not in a folder named `~`; a shell does not expand `--output=~/run`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.new_folder("~/run") == files.user_path(Path("~/run")) == tmp_path / "run"
    assert files.user_path("a/~") == Path("a/~")
    with pytest.raises(ValueError, match=r"~nobody-here/run cannot be found .*whole path"):
        files.user_path("~nobody-here/run")


def test_every_path_of_a_user_goes_through_one_function():
    """Names of shipped files, and the hook that travels without the package, stand apart."""
    package = Path(files.__file__).parent
    taken = re.compile(
        r"(?<![.\w])Path\((path|folder|output|source|release|\w+\.output)\)|expanduser"
    )
    apart = "files.py", "models/pretrained.py", "interventions/standalone_hook.py"
    found = [
        f"{name}: {line.strip()}"
        for path in package.rglob("*.py")
        if (name := path.relative_to(package).as_posix()) not in apart
        for line in path.read_text(encoding="utf-8").splitlines()
        # A run and a sweep's folder expand what they are given.
        if taken.search(line) and "Run(path=" not in line and " / name" not in line
    ]
    assert not found


@pytest.mark.parametrize(
    "name",
    [".tmpnotes", ".tmpAb3dE9", ".backup.2024.old", ".thesis.12.tmp", ".hidden",
     ".a.tl_crosscoder.tmp", ".a.1.tl_crosscoder.tmp.txt"],
)  # fmt: skip
def test_hidden_files_of_others_are_kept(tmp_path, name):
    (tmp_path / name).write_text("mine")
    files.sweep(tmp_path)
    with pytest.raises(ValueError, match="is not an empty folder"):
        files.new_folder(tmp_path)
    with pytest.raises(ValueError, match="is not an empty folder"):
        files.check_folder(tmp_path, "cfg.json", what="run", resume=True, saved=())
    assert content(tmp_path) == {name: "mine"}


def test_what_was_begun_and_saved_nothing_may_begin_anew(tmp_path):
    """As after a command that had too little memory."""
    how = {"what": "run", "resume": False, "saved": ("checkpoints/step_*", "weights")}
    folder = fill(tmp_path / "run", **{"record": "{}", "metrics": ""})
    files.check_folder(folder, "record", **how)
    fill(folder / "checkpoints")
    files.check_folder(folder, "record", **how)
    fill(folder / "checkpoints/step_1")
    with pytest.raises(ValueError, match="already holds a run"):
        files.check_folder(folder, "record", **how)


def test_what_killed_processes_left_is_swept_and_links_are_not_followed(tmp_path):
    mine, folder = fill(tmp_path / "mine", a="mine"), fill(tmp_path / "run", a="kept")
    fill(folder / ".b.1.tl_crosscoder.old", left="over")
    (folder / ".c.json.1.tl_crosscoder.tmp").write_text("half")
    (folder / ".d.1.tl_crosscoder.tmp").symlink_to(mine)
    assert not files.is_empty_folder(folder)
    files.sweep(folder)
    assert content(tmp_path) == {"mine/a": "mine", "run/a": "kept"}
    assert [p.name for p in folder.iterdir()] == ["a"]


def test_a_discarded_folder_is_never_half_there(tmp_path, monkeypatch):
    folder = fill(tmp_path / "old", a="a", b="b")
    monkeypatch.setattr(files.shutil, "rmtree", lambda path: (path / "a").unlink())  # and a kill
    files.discard(folder)
    assert not folder.exists()
    assert all(map(files.is_temporary, tmp_path.iterdir()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_refuses_what_is_not_json_and_keeps_the_old_file(tmp_path, value):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": [1.5, None, "é"]})
    with pytest.raises(ValueError, match=r"a\.json cannot be written: .*not JSON compliant"):
        files.write_json(path, {"a": {"b": [value]}})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1.5, None, "é"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_tensors_that_are_views_are_read_back_equal(tmp_path):
    whole = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    tensors = {
        "whole": whole,
        "transposed": whole.T,
        "rows": whole[1:3],
        "columns": whole[:, ::2],
        "expanded": whole[:1].expand(4, 8),
        "flipped": whole.flip(0),
        "parameter": torch.nn.Parameter(whole[2]),
        "ids": torch.arange(5)[1:],
        "flags": whole > 0,
        "half": whole.bfloat16(),
        "scalar": whole[0, 0],
        "empty": whole[:0],
    }
    files.write_tensors(tmp_path / "t.safetensors", tensors)
    read = load_file(tmp_path / "t.safetensors")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype, name
        assert torch.equal(read[name], tensor), name


def test_writing_leaves_the_tensors_alone(tmp_path):
    whole = torch.randn(3, 4, requires_grad=True)
    view = whole.T
    files.write_tensors(tmp_path / "t.safetensors", {"view": view})
    assert view.stride() == (1, 4)
    assert view.requires_grad


def test_a_tensors_file_may_be_read_by_whom_the_other_files_may(tmp_path):
    files.write_tensors(tmp_path / "t.safetensors", {"a": torch.ones(1)})
    files.write_text(tmp_path / "t.txt", "text")
    one, other = ((tmp_path / f"t.{end}").stat().st_mode for end in ("safetensors", "txt"))
    assert one == other


def test_metadata_is_kept_with_the_tensors(tmp_path):
    path = tmp_path / "t.safetensors"
    files.write_tensors(path, {"a": torch.ones(1)}, metadata={"made": "here"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"made": "here"}


KILLING = '''
import os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load_file
from tl_crosscoder import files

root, kind = Path(sys.argv[1]), sys.argv[2]
path = root / "written"

def write(i):
    if kind == "file":
        n = 1_000_000
        files.write_tensors(path, {"a": torch.full((n,), i), "b": torch.full((n,), i)})
        return
    with files.replacing(path) as temporary:
        temporary.mkdir()
        for j in range(200):
            (temporary / f"part_{j}").write_text(str(i))

def contents():
    """(number of parts, the different values in them)."""
    if kind == "file":
        tensors = load_file(path)
        return len(tensors), {int(v) for t in tensors.values() for v in (t.min(), t.max())}
    parts = list(path.iterdir())
    return len(parts), {int(p.read_text()) for p in parts}

write(0)
expected_parts, _ = contents()
rng = random.Random(0)
n_interrupted = n_kills = 0
while n_interrupted < 5 and n_kills < 100:
    child = os.fork()
    if child == 0:
        for i in range(1, 10**6):
            write(i)
        os._exit(1)
    time.sleep(rng.uniform(0.01, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    n_kills += 1
    leftovers = list(root.glob(".*"))
    n_interrupted += bool(leftovers)
    if path.exists():
        n_parts, values = contents()
        assert (n_parts, len(values)) == (expected_parts, 1), (n_parts, values)
    elif kind == "file":
        raise AssertionError("the file is gone")
    files._remove(*leftovers)
print(n_interrupted, "writes interrupted by", n_kills, "kills")
'''


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_whenever_a_writer_is_killed_what_is_under_the_name_is_complete(tmp_path, kind):
    """For real: a process that writes over and over, killed at random times."""
    done = subprocess.run(
        [sys.executable, "-c", KILLING, str(tmp_path), kind],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) == 5
