"""On how many ranks a run is, as its folder says: `fp16@tp2pp2` is the recipe fp16 on another layout than its model's.

Only runs know of layouts; a model's checkpoint, calibration and quantized weights are those of all of them.
"""

import re

from trtbuild.errors import UserError

_MANY = r"(?:[2-9]|[1-9]\d+)"
# One spelling for each layout; `@tp1` is a single rank, for a model that has more in config/models.yaml.
LAYOUT = rf"@(?:tp1|pp{_MANY}|tp{_MANY}(?:pp{_MANY})?)"


def split_run(run: str) -> tuple[str, str]:
    """A run's recipe, and its layout as in its name, `@` included: empty where it is the model's own.

    Raises `UserError` for what follows an `@` and is no layout.
    """
    recipe, at, rest = run.partition("@")
    if at and not re.fullmatch(LAYOUT, at + rest):
        raise UserError(
            f"{run!r} ends in no layout; write {recipe}@tpN (tensor parallel), {recipe}@ppN (pipeline parallel) or "
            f"{recipe}@tpNppM, with numbers of at least 2, or {recipe}@tp1 for one rank"
        )
    return recipe, at + rest


def sizes(layout: str, model: dict) -> dict[str, int | bool]:
    """`tp_size` and `pp_size`, as a run's name or else its model's entry in config/models.yaml says; 1 by default.

    And `use_parallel_embedding`, where the model's entry says it.
    """
    own = model.get("layout", {})
    said = {f"{kind}_size": int(number) for kind, number in re.findall(r"(tp|pp)(\d+)", layout)}
    options = {key: value for key, value in own.items() if key == "use_parallel_embedding"}
    return {"tp_size": 1, "pp_size": 1} | (said or own) | options


def layout_name(tp_size: int, pp_size: int) -> str:
    """What stands behind the `@`, such as `tp2pp2`; empty for one rank."""
    parts = {"tp": tp_size, "pp": pp_size}
    return "".join(f"{kind}{number}" for kind, number in parts.items() if number > 1)
