"""Bars, lines and notes, on a stderr that is not a terminal."""

import io
import time

import pytest
import tqdm.std

from tl_crosscoder import progress as shown
from tl_crosscoder.progress import note, progress, silenced


@pytest.fixture
def quick(monkeypatch):
    """A line every twentieth of a second, and no bar of another setting."""
    monkeypatch.setattr(shown, "LINE_S", 0.05)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def worked(items, **how) -> None:
    for _ in progress(items, **how):
        time.sleep(0.01)


def test_long_work_prints_plain_lines(quick, capsys):
    worked(range(30), desc="Measuring", unit="batch")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("Measuring: ") and "of 30 [" in line for line in lines)
    assert lines[-1].startswith("Measuring: 100 %, 30 of 30")


def test_a_bar_that_is_updated_keeps_its_text_for_the_next_line(quick, capsys):
    with progress(total=1000, desc="Training", unit="tok", unit_scale=True) as bar:
        for _ in range(20):
            bar.update(10)
            bar.set_postfix_str("loss 0.5")
            time.sleep(0.01)
    lines = capsys.readouterr().err.splitlines()
    assert "of 1.00k" in lines[-1]
    assert "loss 0.5" in lines[-1]
    assert "\r" not in "".join(lines)


def test_short_work_says_nothing(monkeypatch, capsys):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    worked(range(5), desc="Measuring")
    with progress(total=10, desc="Training") as bar:
        bar.set_postfix_str("loss 0.5")  # kept, and not printed
    assert capsys.readouterr().err == ""


def test_work_that_is_not_shown_or_silenced_says_nothing(quick, capsys):
    worked(range(20), desc="Measuring", show=False)
    with silenced():
        worked(range(20), desc="Measuring")
        note("The run is kept.")
        note("A shard is damaged.", is_warning=True)
    assert capsys.readouterr().err == "A shard is damaged.\n"
    note("The run is kept.")
    assert capsys.readouterr().err == "The run is kept.\n"


def test_a_terminal_has_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr("sys.stderr", terminal)
    bar = progress(range(3), desc="Measuring")
    assert isinstance(bar, tqdm.std.tqdm)
    assert list(bar) == [0, 1, 2]
    assert "\rMeasuring: 100%|" in terminal.getvalue()
