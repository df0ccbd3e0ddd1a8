"""Old PyTorch weight files (`pytorch_model.bin`, `consolidated.00.pth`), memory-mapped; nothing in them is executed.

They are ZIP archives of a pickle and of one stored record a storage, `NAME/data/KEY`. Torch maps a record by its
offset, believes the pickle about its size, and never looks at its checksum; both are compared here.
"""

import pickle
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from trtbuild.errors import UserError
from trtbuild.files import check_input
from trtbuild.limits import TEXT_BYTES
from trtbuild.tensors.lazy import LazyTensor

# What torch's reader and the ZIP library raise for files that are not what they seem.
DAMAGE: tuple[type[Exception], ...] = (
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError),
    *(AssertionError, NotImplementedError, struct.error, zipfile.BadZipFile),
)


def open_torch_file(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a file that `torch.save` wrote from a dictionary of tensors; their data stays on disk.

    Raises `UserError` if the file is missing, truncated, not in the format of torch 1.6 and later (a ZIP archive), or
    holds anything but tensors: it is read with `weights_only`, which unpickles tensors and plain containers alone. A
    storage's checksum is compared when one of its tensors is first loaded, which reads it anyway.
    """
    if not path.exists():
        raise UserError(f"missing weights file {path}")
    check_input(path)
    try:
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is truncated, or not in the format of torch 1.6 and later; fetch it again, or load and save "
                "it with a newer torch"
            )
        records = _records(path)
        with warnings.catch_warnings(action="ignore"):  # torch's advice on pickles, in front of our own line
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
    storages = _matched(path, records, [value.untyped_storage() for value in content.values()])
    verified: set[int] = set()

    def load(name: str) -> torch.Tensor:
        value = content[name].detach()
        pointer = value.untyped_storage().data_ptr()
        if pointer in storages and pointer not in verified:
            data = torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage())
            if zlib.crc32(data.numpy().data) != storages[pointer].crc:
                raise UserError(f"{path} is damaged: the checksum of the tensor {name} is wrong; fetch it again")
            verified.add(pointer)
        return value

    return {name: LazyTensor(value.dtype, tuple(value.shape), partial(load, name)) for name, value in content.items()}


@dataclass(frozen=True)
class _Record:
    """Bytes `start` to `start + size` of the file."""

    start: int
    size: int
    crc: int


def _records(path: Path) -> list[_Record]:
    """The storages' records by their place. All other records, which are small, are read and so checked."""
    records = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
                raise ValueError(f"its record {info.filename} is compressed")
            if info.filename.split("/")[1:2] != ["data"]:
                if info.file_size > TEXT_BYTES:
                    raise ValueError(f"its record {info.filename} has {info.file_size} bytes")
                archive.read(info)
                continue
            file.seek(info.header_offset + 26)  # the lengths of the name and of what follows it
            start = info.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            if info.file_size:
                records.append(_Record(start, info.file_size, info.CRC))
    return sorted(records, key=lambda record: record.start)


def _matched(path: Path, records: list[_Record], storages: list[torch.UntypedStorage]) -> dict[int, _Record]:
    """Each storage's record, by the storage's address: they lie in memory as in the file, one for one."""
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.nbytes()}
    places = sorted(sizes)
    if len(places) != len(records) or any(
        (pointer - places[0], sizes[pointer]) != (record.start - records[0].start, record.size)
        for pointer, record in zip(places, records, strict=True)
    ):
        raise UserError(f"{path} is damaged: its storages are not as large as its pickle says; fetch it again")
    return dict(zip(places, records, strict=True))


def _reason(error: Exception) -> str:
    """The sentence of torch's long message that says what is wrong."""
    text = " ".join(str(error).split())
    for start in ("Trying to load unsupported GLOBAL ", "Unsupported global: ", "WeightsUnpickler error: "):
        if start in text:
            return text[text.index(start) :].split(". ")[0][:160]
    return text[:160]
