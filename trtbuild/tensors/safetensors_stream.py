"""Safetensors written tensor by tensor and read as memory maps.

The library's `save_file` wants every tensor in memory at once; this writer holds one. Format:
https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header, data).
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from trtbuild.errors import UserError
from trtbuild.files import atomic, check_input, write_json
from trtbuild.tensors.lazy import LazyTensor

ALIGNMENT = 64  # bytes; mapped weights then start on a cache line
LONGEST_HEADER = 100_000_000  # bytes; the format's limit
NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def write_file(
    path: Path,
    tensors: Mapping[str, LazyTensor],
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Streams `tensors` into one safetensors file, one at a time; calls `progress(bytes)` after each.

    Not atomic by itself: give it the temporary path of `files.atomic`.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-(8 + len(encoded)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for name, tensor in tensors.items():
            value = tensor.load().contiguous()
            if value.dtype != tensor.dtype or tuple(value.shape) != tensor.shape:
                raise ValueError(
                    f"{name}: announced {tensor.dtype}{list(tensor.shape)}, got {value.dtype}{list(value.shape)}"
                )
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)
            del value  # before the next one is loaded
            progress(tensor.nbytes)


def write_sharded(
    folder: Path,
    tensors: Mapping[str, LazyTensor],
    max_shard_bytes: int = 4 << 30,
    progress: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Writes `model.safetensors`, or `model-00001-of-0000N.safetensors` and the Hugging Face index beside them."""
    shards: list[dict[str, LazyTensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        with atomic(folder / "model.safetensors") as path:
            write_file(path, shards[0], {"format": "pt"}, progress)
        return
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with atomic(folder / file_name) as path:
            write_file(path, shard, {"format": "pt"}, progress)
        index |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def header_sha256(path: Path) -> str:
    """Hex digest of a file's header, which is all but the tensors' values: names, dtypes, shapes, places, metadata."""
    return hashlib.sha256(_header(path)).hexdigest()


def _header(path: Path) -> bytes:
    """The length of the header, and it."""
    with open(path, "rb") as file:
        length = file.read(8)
        return length + file.read(min(int.from_bytes(length, "little"), LONGEST_HEADER))


def _places(path: Path) -> dict[str, int]:
    """Where in a file that the library has found to be right each tensor's first byte is."""
    header = _header(path)
    tensors = json.loads(header[8:])
    return {name: len(header) + spec["data_offsets"][0] for name, spec in tensors.items() if name != "__metadata__"}


@dataclass(frozen=True)
class _Stored:
    """A `load` of a tensor of an open file, which begins at the byte `place`."""

    file: safe_open
    name: str
    path: Path
    place: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    def __call__(self) -> torch.Tensor:
        return self.file.get_tensor(self.name)

    def narrow(self, dim: int, start: int, length: int) -> "_Part":
        return _Part(self, dim, start, length)

    def read_into(self, start: int, memory: memoryview) -> None:
        """Fills `memory` with the tensor's bytes from `start` on."""
        with open(self.path, "rb", buffering=0) as file:
            _read_into(memory, file.fileno(), self.place + start, self.path)


@dataclass(frozen=True)
class _Part:
    """A `load` of some elements of a stored tensor along a dimension."""

    whole: _Stored
    dim: int
    start: int
    length: int

    def __call__(self) -> torch.Tensor:
        """Reads them row by row, a row being what lies together."""
        *outer, size, inner = *self.whole.shape[: self.dim + 1], math.prod(self.whole.shape[self.dim + 1 :])
        step = inner * self.whole.dtype.itemsize
        rows = torch.empty(math.prod(outer), self.length * step, dtype=torch.uint8)
        with open(self.whole.path, "rb", buffering=0) as file:
            for i, row in enumerate(rows.numpy()):
                place = self.whole.place + (i * size + self.start) * step
                _read_into(memoryview(row), file.fileno(), place, self.whole.path)
        return rows.view(-1).view(self.whole.dtype).view(*outer, self.length, *self.whole.shape[self.dim + 1 :])


def _read_into(memory: memoryview, file: int, place: int, path: Path) -> None:
    while memory:
        if not (count := os.preadv(file, [memory], place)):
            raise UserError(f"{path} is shorter than it was; fetch or build it again")
        memory, place = memory[count:], place + count


def open_file(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file: nothing is read until `load()`, which maps a whole tensor.

    A part of one (`narrow`) is read instead: what is mapped counts as memory of the process until the file is closed.
    Raises `UserError` if the file is missing, truncated or not safetensors.
    """
    if not path.exists():
        raise UserError(f"missing weights file {path}")
    check_input(path)
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file ({error}); fetch or build it again") from error
    tensors, places = {}, _places(path)
    for name in file.keys():  # noqa: SIM118 (safe_open is not iterable)
        view = file.get_slice(name)
        if view.get_dtype() not in DTYPES:
            raise UserError(f"{path}: tensor {name} has the dtype {view.get_dtype()}; known are {', '.join(DTYPES)}")
        dtype, shape = DTYPES[view.get_dtype()], tuple(view.get_shape())
        tensors[name] = LazyTensor(dtype, shape, _Stored(file, name, path, places[name], dtype, shape))
    return tensors, file.metadata() or {}
