"""Names of runs, and the layouts that they and models ask for."""

import re

import pytest

from trtbuild.errors import UserError
from trtbuild.layout import LAYOUT, layout_name, sizes, split_run


@pytest.mark.parametrize(
    ("run", "recipe", "layout", "tp_size", "pp_size"),
    [
        ("fp16", "fp16", "", 1, 1),
        ("fp16@tp2", "fp16", "@tp2", 2, 1),
        ("fp16@pp12", "fp16", "@pp12", 1, 12),
        ("a.b-c@tp10pp2", "a.b-c", "@tp10pp2", 10, 2),
        ("fp16@tp1", "fp16", "@tp1", 1, 1),
        ("checkpoint", "checkpoint", "", 1, 1),
    ],
)
def test_names_of_runs(run, recipe, layout, tp_size, pp_size):
    assert split_run(run) == (recipe, layout)
    assert sizes(layout, {}) == {"tp_size": tp_size, "pp_size": pp_size}
    assert re.fullmatch(f"(?:{LAYOUT})?", layout)
    assert layout_name(tp_size, pp_size) == ("" if layout == "@tp1" else layout.removeprefix("@"))


@pytest.mark.parametrize(
    "name", ["", "tp", "tp0", "tp02", "pp1", "tp1pp2", "tp2pp1", "pp2tp2", "tp2@pp2", "2", "tp-2", "TP2"]
)
def test_a_layout_has_one_spelling(name):
    with pytest.raises(UserError, match=re.escape(f"'x@{name}' ends in no layout; write x@tpN (tensor")):
        split_run(f"x@{name}")


def test_a_run_without_a_layout_has_its_models():
    own = {"layout": {"tp_size": 4, "pp_size": 2}}
    assert sizes("", own) == {"tp_size": 4, "pp_size": 2}
    assert sizes("", {"layout": {"pp_size": 3}}) == {"tp_size": 1, "pp_size": 3}
    assert sizes("@tp2", own) == {"tp_size": 2, "pp_size": 1}
    assert sizes("@tp1", own) == {"tp_size": 1, "pp_size": 1}
    whole = {"layout": {"tp_size": 4, "use_parallel_embedding": False}}
    assert sizes("", whole) == {"tp_size": 4, "pp_size": 1, "use_parallel_embedding": False}
    assert sizes("@pp2", whole) == {"tp_size": 1, "pp_size": 2, "use_parallel_embedding": False}
