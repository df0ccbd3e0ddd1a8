"""What the layouts share: small integers packed into int32 words, the first in the lowest bits, and groups."""

from collections.abc import Sequence

import torch

from trtbuild.errors import UserError
from trtbuild.tensors.lazy import LazyTensor


def pack(values: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Unsigned values (any integer dtype) `[..., n]` to int32 `[..., n * bits / 32]`."""
    per_word = 32 // bits
    words = torch.zeros((*values.shape[:-1], values.shape[-1] // per_word), dtype=torch.int32)
    for i in range(per_word):
        words |= values[..., i::per_word].int() << bits * i
    return words


def unpack(words: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """The inverse of `pack`, as int16 (which holds every unsigned byte)."""
    per_word = 32 // bits
    values = torch.empty((*words.shape[:-1], words.shape[-1] * per_word), dtype=torch.int16)
    for i in range(per_word):
        values[..., i::per_word] = words >> bits * i & (1 << bits) - 1
    return values


def signed(words: torch.Tensor, bits: int = 4, order: Sequence[int] | None = None) -> torch.Tensor:
    """The same less half their range, which all the layouts add to signed values: int8.

    `order`: the places of a word's values, from the lowest bits on. Nothing wider is held than the words and one value
    of each.
    """
    per_word = 32 // bits
    values = torch.empty((*words.shape[:-1], words.shape[-1] * per_word), dtype=torch.int8)
    for i, place in enumerate(order or range(per_word)):
        values[..., place::per_word] = (words >> bits * i).bitwise_and_((1 << bits) - 1).sub_(1 << bits - 1)
    return values


def count_groups(width: int, group_size: object, where: str) -> int:
    """Groups of `width` input channels; a negative size means one. Raises `UserError` for what is no size."""
    if not isinstance(group_size, int) or group_size == 0:
        raise UserError(f"{where}: group_size is {group_size!r}; a number of channels, or -1, is expected")
    if group_size > 0 and width % group_size:
        raise UserError(f"{where}: group_size {group_size} does not divide {width} input channels")
    return 1 if group_size < 0 else width // group_size


def group_order(name: str, index: LazyTensor, width: int, groups: int, where: str) -> LazyTensor | None:
    """The order, int32 `[in]`, that brings together the channels of each group; None where they lie so.

    `index` `[in]` holds each channel's group. Raises `UserError` unless the groups are of one size.
    """
    expect(name, index, (torch.int32, torch.int64), (width,), where)
    groups_in_order, order = index.load().sort(stable=True)
    if not groups_in_order.equal(torch.arange(width, dtype=index.dtype) // (width // groups)):
        raise UserError(f"{where}: {name} does not give each of {groups} groups {width // groups} input channels")
    if order.equal(torch.arange(width)):
        return None
    return LazyTensor(torch.int32, (width,), lambda: index.load().argsort(stable=True).int())


def expect(name: str, tensor: LazyTensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], where: str) -> None:
    """Raises `UserError` unless a tensor is of one of the dtypes and of the shape."""
    if tensor.dtype not in dtypes or tensor.shape != shape:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UserError(
            f"{where}: {name} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}; "
            f"{names} {list(shape)} is expected"
        )
