"""What lies outside the program is one line; what lies within is not."""

from pathlib import Path

import pytest
import torch

from trtbuild.errors import UserError, one_line


def raised(call) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (Path("missing/file").stat, "missing/file: No such file or directory"),
        (Path("/proc/self/mem/x").stat, "/proc/self/mem/x: Not a directory"),
        (
            lambda: torch.empty(1 << 50),
            "out of memory (.*you tried to allocate 4503599627370496 bytes.*); use a smaller",
        ),
        (
            lambda: bytearray(1 << 60),
            "out of memory (of this machine); use a smaller model or batch, or a larger machine",
        ),
        (lambda: __import__("no_such_package"), "no_such_package is not installed"),
    ],
)
def test_outside(call, line):
    begin, _, end = line.partition(".*")
    said = one_line(raised(call))
    assert said.startswith(begin)
    assert "\n" not in said
    assert all(part in said for part in end.split(".*"))


def test_a_line_is_one_line():
    assert one_line(UserError("a name\nwith a break")) == "a name with a break"
    assert one_line(OSError("cannot load\nthe model")) == "cannot load the model"


@pytest.mark.parametrize(
    "error", [ValueError("x"), KeyError("x"), RuntimeError("x"), AssertionError(), RecursionError()]
)
def test_within(error):
    assert one_line(error) is None
