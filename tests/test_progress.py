"""Bars on a terminal and lines in a log; what was made."""

import gc
import re
import sys
import time

import pytest

from trtbuild import files, progress
from trtbuild.progress import OutputBar, amount, byte_bar, item_bar, made


class Log:
    """What stands in a log, which is no terminal, so far."""

    def __init__(self, capsys):
        self.capsys, self.text = capsys, ""

    def read(self, more=0):
        """All of it, once there are so many lines more."""
        deadline, wanted = time.monotonic() + 300, self.text.count("\n") + more
        while True:
            self.text += self.capsys.readouterr().err
            if self.text.count("\n") >= wanted:
                return self.text
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def log(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    return Log(capsys)


def test_a_log_has_lines_also_while_nothing_moves(log):
    with byte_bar(4000, "convert") as bar:
        assert re.match(r"convert:   0%\|.*\| 0.00/4.00k \[\d\d:\d\d<", log.read(more=2))
        bar.update(1000)
        assert "convert:  25%" in log.read(more=2).splitlines()[-1]
        bar.update(3000)
    said = log.read()
    assert "convert: 100%" in said.splitlines()[-1]
    assert "\r" not in said
    time.sleep(0.2)
    assert log.read() == said  # it is over


def test_what_is_soon_over_is_not_said(log, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 60)
    with item_bar(3, "summaries", "token") as bar:
        bar.update(3)
    assert log.read() == ""


def test_a_terminal_has_a_bar(log, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with item_bar(3, "summaries", "token") as bar:
        bar.update(3)
    assert log.read().startswith("\rsummaries:   0%")


def test_outputs_and_the_time_left():
    """Two prompts of 30 and 10 tokens, with 10 tokens each at most."""
    with OutputBar([30, 10], 10, "summaries", "article") as bar:
        bar.token(0)
        assert bar._bar.n == 31
        bar.say("batch 2 of at most 9")
        bar.token(1)
        assert bar._bar.n == 31 + 11
        bar.output(0)  # it has ended early
        assert bar._bar.n == 40 + 11
        shown = str(bar._bar)
        assert re.match(
            r"summaries:  85%\|#.*\| \[00:00<00:00, 1 of 2 articles, \d+ tokens/s, batch 2 of at most 9\]", shown
        )
        bar.output(1)  # beams come without their tokens
    assert bar._bar.n == 60


def test_hashing_a_large_file_shows_a_bar(log, monkeypatch, tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(256)) * 40000)
    digest = files.sha256(file)
    shown = []
    bar = progress.byte_bar
    monkeypatch.setattr(progress, "byte_bar", lambda total, what: shown.append((total, what)) or bar(total, what))
    monkeypatch.setattr(files, "SLOW", 1 << 20)
    assert files.sha256(file) == digest
    assert shown == [(file.stat().st_size, "sha256 of weights")]


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (269_100_000, "269.1 MB"),
        (13.5e9, "13.5 GB"),
        (2e12, "2000.0 GB"),
    ],
)
def test_amount(nbytes, text):
    assert amount(nbytes) == text


def test_made_says_how_large_and_how_long(log, tmp_path):
    with made(tmp_path / "folder"):
        (tmp_path / "folder" / "deep").mkdir(parents=True)
        (tmp_path / "folder" / "deep" / "a").write_bytes(bytes(1500))
        (tmp_path / "folder" / "b").symlink_to(tmp_path / "folder" / "deep" / "a")
    assert re.fullmatch(rf"{tmp_path}/folder: 3.0 kB in \d+ s\n", log.read())
    with pytest.raises(ValueError, match="no"), made(tmp_path / "nothing"):
        raise ValueError("no")
    assert "nothing" not in log.read()


def test_a_bar_interrupted_while_it_is_made_says_nothing(monkeypatch):
    said: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    bar = progress._Lines.__new__(progress._Lines)
    del bar
    gc.collect()
    assert not said
