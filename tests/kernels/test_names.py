"""A profile tells kernels, and what kind they are, by their names (`evaluation/profile.py`)."""

import ast
from collections import Counter
from pathlib import Path

import trtbuild


def test_every_kernel_that_is_launched_has_a_name_of_its_own():
    launched = Counter(
        node.value.id
        for path in Path(trtbuild.__file__).parent.joinpath("kernels").glob("*.py")
        for node in {n.func.value.id: n.func for n in launches(path)}.values()
    )
    assert len(launched) > 5
    assert [name for name, files in launched.items() if files > 1 or name == "_kernel"] == []


def launches(path: Path) -> list[ast.Call]:
    """Calls of the form `kernel[grid](...)`."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    named = [call for call in calls if isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)]
    return [call for call in named if call.func.value.id.endswith("kernel")]
