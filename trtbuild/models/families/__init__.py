"""Hugging Face configurations that the decoder can serve, by their `model_type`."""

from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.models import llama
from trtbuild.models.config import ModelConfig

FAMILIES = {"llama": llama}


def config_from_hugging_face(config: dict, where: Path | str) -> ModelConfig:
    """Dispatches on `model_type`; an unknown one is a `UserError` that lists what is supported."""
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise UserError(f"{where}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}")
    try:
        return FAMILIES[model_type].model_config(config, where)
    except KeyError as error:
        raise UserError(f"{where}: the key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: a value has the wrong type ({error})") from error
