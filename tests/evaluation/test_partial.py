"""Outputs that an interrupted run leaves, and what the next one makes of them."""

import errno
import json

import pytest

from trtbuild.errors import UserError
from trtbuild.evaluation.partial import partial_outputs
from trtbuild.files import atomic
from trtbuild.runtime.generation import Output

ASKED = {"model": "tëst", "prompts": [[1, 2], [3]]}
OUTPUTS = [Output([5, 6], "eos"), Output([], "length"), Output([7], "stop")]


def interrupted(path, numbers, asked=ASKED, count=3):
    """A run that ends after some outputs; what was there when it began."""
    with pytest.raises(KeyboardInterrupt), partial_outputs(path, asked, count) as partial:  # noqa: PT012
        there = dict(partial.there)
        for i in numbers:
            partial.add(i, OUTPUTS[i])
        raise KeyboardInterrupt
    return there


def test_a_run_goes_on_where_one_of_the_same_was_interrupted(tmp_path):
    path = tmp_path / "summaries.jsonl"
    assert interrupted(path, []) == {}
    assert list(tmp_path.iterdir()) == []
    assert interrupted(path, [2]) == {}
    assert interrupted(path, [0]) == {2: OUTPUTS[2]}
    with partial_outputs(path, ASKED, 3) as partial:
        assert partial.there == {0: OUTPUTS[0], 2: OUTPUTS[2]}
        partial.add(1, OUTPUTS[1])
        assert partial.there == dict(enumerate(OUTPUTS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", range(3))
def test_a_line_that_a_kill_cut_off_does_not_count(tmp_path, kept):
    path = tmp_path / "summaries.jsonl"
    interrupted(path, [0, 1, 2])
    (file,) = tmp_path.iterdir()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[: kept + 1]) + lines[kept + 1][:-1])
    assert interrupted(path, [2]) == dict(list(enumerate(OUTPUTS))[:kept])
    assert interrupted(path, []) == dict(list(enumerate(OUTPUTS))[:kept]) | {2: OUTPUTS[2]}


@pytest.mark.parametrize("text", ["", "no JSON", "\n", "\xff", json.dumps({"asked": "another"}) + "\n[0, [1], 5]\n"])
def test_what_another_run_or_nobody_left_does_not_count(tmp_path, text):
    path = tmp_path / "summaries.jsonl"
    interrupted(path, [1])
    (file,) = tmp_path.iterdir()
    file.write_bytes(text.encode("latin-1"))
    assert interrupted(path, [0]) == {}
    assert interrupted(path, [], ASKED | {"model": "other"}) == {}
    assert interrupted(path, []) == {0: OUTPUTS[0]}


def test_outputs_of_two_runs_at_once_are_not_mixed(tmp_path):
    """Of two that were asked for different things, and that write one file, the one that came last is gone on with."""
    path = tmp_path / "summaries.jsonl"
    with pytest.raises(KeyboardInterrupt), partial_outputs(path, ASKED, 3) as first:  # noqa: PT012
        first.add(0, OUTPUTS[0])
        interrupted(path, [2], "another")
        first.add(1, OUTPUTS[1])
        raise KeyboardInterrupt
    assert interrupted(path, [], "another") == {2: OUTPUTS[2]}


def test_nothing_is_left_where_the_user_is_told_what_is_wrong(tmp_path):
    path = tmp_path / "summaries.jsonl"
    with pytest.raises(UserError, match="not finite"), partial_outputs(path, ASKED, 3) as partial:  # noqa: PT012
        partial.add(0, OUTPUTS[0])
        raise UserError("numbers are not finite")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_loses_nothing(tmp_path):
    path = tmp_path / "summaries.jsonl"
    interrupted(path, [0, 1])
    with pytest.raises(UserError, match="disk full"), partial_outputs(path, ASKED, 3), atomic(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert interrupted(path, []) == {0: OUTPUTS[0], 1: OUTPUTS[1]}
