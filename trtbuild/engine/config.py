"""What an engine was built for: limits, and the `config.json` of an engine folder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.files import check_shape, kind_of, read_json, sha256, write_json

CONFIG_FILE = "config.json"
FILE = {"bytes": int, "sha256": str}
SHAPE = {
    "model": str,
    "recipe": {"dtype": str},
    "limits": {"max_batch_size": int, "max_input_len": int, "max_output_len": int},
    "remove_input_padding": bool,
    "mapping": {"tp_size": int, "pp_size": int},
    "builders": dict,
    "inputs": dict,
}
PAGES_ON_CPU = 1 << 30  # bytes that caches in pages may take there, if a batch's are not more
REHEARSAL = "rehearsal/"  # begins the names of models that are rehearsed with dummy weights


@dataclass(frozen=True)
class BuildLimits:
    """The largest request that an engine serves. A sequence's KV cache holds `max_length` positions."""

    max_batch_size: int = 8
    max_input_len: int = 1024
    max_output_len: int = 128

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")

    @property
    def max_length(self) -> int:
        return self.max_input_len + self.max_output_len


def marker(model: str) -> dict:
    """What marks a result of this model as a rehearsal: `{"rehearsal": True}`, or for a real model nothing."""
    return {"rehearsal": True} if model.startswith(REHEARSAL) else {}


def rank_file(rank: int, kind: str) -> str:
    """File name of one rank's engine; `kind` is `portable` or `tensorrt`."""
    return f"rank{rank}.{ {'portable': 'safetensors', 'tensorrt': 'engine'}[kind] }"


def write_config(folder: Path, outputs: list[str], **content: object) -> None:
    """Writes `config.json` with what tells every engine file that `outputs` names from another (`identify`)."""
    write_json(folder / CONFIG_FILE, content | {"outputs": {name: identify(folder / name) for name in outputs}})


def identify(path: Path) -> dict:
    """Size and sha256 of an engine file, and of a portable engine's header, which holds the network."""
    found = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return found | ({"header_sha256": _header_sha256(path)} if _is_portable(path.name) else {})


def _header_sha256(path: Path) -> str:
    from trtbuild.tensors.safetensors_stream import header_sha256  # it takes torch, and the Snakefile does without

    return header_sha256(path)


def _is_portable(name: str) -> bool:
    return name.endswith(".safetensors")


def read_config(folder: Path, check: bool = False) -> dict:
    """Reads an engine folder's `config.json` and checks every file it lists: its size, and a portable engine's header.

    With `check` also the sha256 of all bytes, which takes as long as reading them. Raises `UserError` if the folder is
    no engine, a rank's file is missing, or a file is not the one that was built.
    """
    if not (folder / CONFIG_FILE).exists():
        raise UserError(f"{folder} is not an engine folder: it has no {CONFIG_FILE}; build one with 'trtbuild build'")
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config.get("outputs"), dict):  # a model's config.json has the same name
        raise UserError(f"{folder} is not an engine folder: its {CONFIG_FILE} lists no engine files")
    check_shape(config, SHAPE | {"outputs": dict.fromkeys(config["outputs"], FILE)}, folder / CONFIG_FILE)
    BuildLimits(**config["limits"])
    for name, expected in config["outputs"].items():
        path = folder / name
        if Path(name).name != name:
            raise UserError(f"{folder / CONFIG_FILE} lists {name!r}, which is no file of this folder; build it again")
        if _is_portable(name) and "header_sha256" not in expected:
            raise UserError(f"{folder} was built by an earlier version of trtbuild; build the engine again")
        if kind_of(path) != "file":
            raise UserError(f"{folder} is incomplete: {name} is missing; build the engine again")
        if different := _difference(path, expected, check):
            raise UserError(f"{path} is not the file that was built (its {different} differs); build the engine again")
    return config


def _difference(path: Path, expected: dict, check: bool) -> str | None:
    """In what a file is not the expected one, as far as it is looked at."""
    if path.stat().st_size != expected["bytes"]:
        return "size"
    if _is_portable(path.name) and _header_sha256(path) != expected["header_sha256"]:
        return "header"
    return "sha256" if check and sha256(path) != expected["sha256"] else None
