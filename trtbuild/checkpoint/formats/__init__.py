"""Published layouts of quantized weights, read and written: one file each. docs/formats.md describes them."""

import re
from collections.abc import Mapping

from trtbuild.checkpoint.formats import awq, compressed_tensors, gptq
from trtbuild.errors import UserError
from trtbuild.tensors.lazy import LazyTensor
from trtbuild.tensors.quantized_weight import QuantizedWeight

FORMATS = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors}


def read_quantized(
    quantization: dict, tensors: Mapping[str, LazyTensor], where: str
) -> dict[str, LazyTensor | QuantizedWeight]:
    """A checkpoint's tensors with the parts of each quantized weight put together under its canonical name.

    `quantization` is the `quantization_config` of its config.json. Raises `UserError` for a layout, an option or a
    shape that is not supported.
    """
    if not isinstance(quantization, dict):
        raise UserError(f"{where}: quantization_config is a {type(quantization).__name__}; an object is expected")
    method = quantization.get("quant_method")
    if method not in FORMATS:
        raise UserError(f"{where}: quant_method {method!r} is not supported; supported are {', '.join(FORMATS)}")
    try:
        return FORMATS[method].read(_coerced(quantization), tensors, where)
    except KeyError as error:
        raise UserError(f"{where}: the quantized checkpoint lacks {error}") from error
    except (TypeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{where}: its quantization_config, or a tensor, is not of its layout ({error})") from error


def _coerced(value: object) -> object:
    """A configuration with numbers that were written as strings (`bits: "4"`) as numbers."""
    if isinstance(value, dict):
        return {key: _coerced(x) for key, x in value.items()}
    return int(value) if isinstance(value, str) and re.fullmatch("-?[0-9]+", value) else value
