"""Old PyTorch weight files (`pytorch_model.bin`, `consolidated.00.pth`), memory-mapped; nothing in them is executed."""

import pickle
import zipfile
from pathlib import Path

import torch

from trtbuild.checkpoint.lazy import LazyTensor
from trtbuild.errors import UserError
from trtbuild.files import refuse_lfs_pointer

# What torch's reader and the ZIP library raise for files that are not what they seem.
DAMAGE = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError)
DAMAGE += (AssertionError, zipfile.BadZipFile)


def open_torch_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that `torch.save` wrote from a dictionary of tensors; their data stays on disk.

    Raises `UserError` if the file is missing, truncated, not in the format of torch 1.6 and later (a ZIP archive), or
    holds anything but tensors: it is read with `weights_only`, which unpickles tensors and plain containers alone.
    """
    if not path.is_file():
        raise UserError(f"missing weights file {path}")
    refuse_lfs_pointer(path)
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is truncated, or not in the format of torch 1.6 and later; fetch it again, or load and save "
                "it with a newer torch"
            )
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} holds more than tensors, and is not read: {_reason(error)}") from error
    except DAMAGE as error:
        raise UserError(f"{path} is truncated or damaged ({_reason(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; a dictionary of tensors is expected")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UserError(f"{path}: {name!r} is a {type(value).__name__}; only named tensors are expected")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise UserError(f"{path}: the tensor {name} is sparse, or has no data; only dense ones are expected")
    return {
        name: LazyTensor(value.dtype, tuple(value.shape), lambda value=value: value.detach())
        for name, value in content.items()
    }


def _reason(error: Exception) -> str:
    """The sentence of torch's long message that says what is wrong."""
    text = " ".join(str(error).split())
    for start in ("Trying to load unsupported GLOBAL ", "Unsupported global: ", "WeightsUnpickler error: "):
        if start in text:
            return text[text.index(start) :].split(". ")[0][:160]
    return text[:160]
