"""The families of published models, one file each, named after the `model_type` of their `config.json`.

A family says how its configuration and its weights read in canonical terms, and which tokenizer files it has. Its
module defines what `Family` lists; being in this folder makes it known.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from trtbuild.errors import UserError
from trtbuild.models.config import EXTENSION, ModelConfig
from trtbuild.models.values import coerced

if TYPE_CHECKING:
    from trtbuild.tensors.lazy import LazyTensor

T = TypeVar("T")
FAMILIES = tuple(sorted(module.name for module in iter_modules(__path__)))
# What a `model_type` may begin with that looks like a supported family but is none.
RELATIVES = {
    "qwen2": "another generation than the supported 'qwen'",
    "qwen3": "another generation than the supported 'qwen'",
    "Yi": "an early revision of Yi; later ones, of model_type 'llama', are supported",
}


class Family(Protocol):
    """What a family's module defines."""

    DESCRIPTION: str  # which models these are, for messages
    VERSIONS: tuple[str, ...]  # names of versions that its configurations may not tell apart; mostly none
    TOKENIZER_FILE: str  # the original tokenizer, where there is no tokenizer.json

    def canonical_config(self, config: dict, where: Path | str, model_version: str | None) -> dict:
        """A published `config.json` as a canonical one (`ModelConfig.from_canonical`).

        Raises `KeyError` for a missing key, `UserError` for a wrong one or a `model_version` (of `VERSIONS`) that it is
        not.
        """

    def canonical_tensors(self, tensors: "dict[str, LazyTensor]", config: dict) -> "dict[str, LazyTensor]":
        """Tensors under canonical names, fused ones split; unknown names stay. `config` is the canonical one."""

    def save_tokenizer(self, file: Path, folder: Path, config: dict) -> None:
        """Makes `tokenizer.json` in `folder` from the original tokenizer file. `config` is the canonical one."""


def family_of(config: dict, where: Path | str) -> Family:
    """The family of a published `config.json`; an unknown one is a `UserError` that lists what is supported."""
    model_type = str(config.get("model_type"))
    if model_type in FAMILIES:
        return cast(Family, import_module(f"{__name__}.{model_type}"))
    supported = ", ".join(f"{name} ({import_module(f'{__name__}.{name}').DESCRIPTION})" for name in FAMILIES)
    relations = [relation for beginning, relation in RELATIVES.items() if model_type.startswith(beginning)]
    reason = relations[0] if relations else "not supported"
    raise UserError(f"{where}: model_type {config.get('model_type')!r} is {reason}; supported are {supported}")


def is_canonical(config: dict) -> bool:
    """Whether a `config.json` is in canonical terms already, as LLaMA's own is."""
    return bool(config.get(EXTENSION)) or config.get("model_type") == "llama"


def canonical_config(config: dict, where: Path | str, model_version: str | None = None) -> dict:
    """A published or canonical `config.json` in canonical terms, its values in their kinds (`values.coerced`).

    Whatever is wrong with it is a `UserError`.
    """
    config = coerced(config, where)
    if config.get(EXTENSION):
        if model_version not in (None, config[EXTENSION].get("version")):
            raise UserError(f"{where}: model_version is given as {model_version}, which is not what this is")
        return config
    family = family_of(config, where)
    if model_version and model_version not in family.VERSIONS:
        known = f"it has {', '.join(family.VERSIONS)}" if family.VERSIONS else "it has no versions, leave it out"
        raise UserError(f"{where}: {family.DESCRIPTION} has no model_version {model_version!r}; {known}")
    return _reading(lambda: family.canonical_config(config, where, model_version), where)


def config_from_hugging_face(config: dict, where: Path | str) -> ModelConfig:
    """What the decoder needs to know of a published or canonical `config.json`."""
    return _reading(lambda: ModelConfig.from_canonical(canonical_config(config, where), where), where)


def _reading(read: Callable[[], T], where: Path | str) -> T:
    try:
        return read()
    except KeyError as error:
        raise UserError(f"{where}: the key {error} is missing") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: a value has the wrong type ({error})") from error
