"""What a portable engine needs of a GPU's memory: one that does not fit is refused before its weights are loaded."""

import math
from bisect import bisect
from dataclasses import replace

import torch

from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.network import Network
from trtbuild.network.step import captured_rows

OTHERS = 512 << 20  # bytes that libraries, kernels and the nodes of captured graphs take
WIDENED = {torch.uint8: 4, torch.int8: 2, torch.float8_e4m3fn: 2}  # times that a weight's 16-bit copy is larger


def check_memory(network: Network, limits: BuildLimits, free: int) -> None:
    """Raises `UserError` unless weights, caches and the largest step that the limits allow fit into `free` bytes.

    That step has `max_batch_size` prompts of `max_input_len` tokens, and the logits of one token each.
    """
    weights = sum(constant.nbytes for constant in network.constants.values())

    def parts(limits: BuildLimits) -> tuple[int, int, int]:
        return weights, _caches(network, limits), _step(network, limits)

    def fits(**changes: int) -> bool:
        return sum(parts(replace(limits, **changes))) <= free

    if fits():
        return
    batch = bisect(range(1, limits.max_batch_size), False, key=lambda n: not fits(max_batch_size=n))
    length = bisect(range(1, limits.max_input_len), False, key=lambda n: not fits(max_batch_size=1, max_input_len=n))
    right = "the weights alone need fewer bits or more GPUs"
    if batch or length:
        change = f"max-batch-size {batch}" if batch else f"max-batch-size 1 --max-input-len {length}"
        right = f"build it with --{change}"
    sizes = parts(limits)
    whole, of_weights, of_caches, of_step, there = (f"{size / 1e9:.1f}" for size in (sum(sizes), *sizes, free))
    raise UserError(
        f"the engine needs {whole} GB of GPU memory (weights {of_weights}, caches of {limits.max_batch_size} x "
        f"{limits.max_length} positions {of_caches}, the largest step {of_step}) and {there} are free; {right}"
    )


def _caches(network: Network, limits: BuildLimits) -> int:
    tensors = [network.tensors[name] for name in network.states]
    per_position = sum(tensor.size(1) * tensor.size(3) * tensor.dtype.itemsize for tensor in tensors)
    return limits.max_batch_size * limits.max_length * per_position


def _step(network: Network, limits: BuildLimits) -> int:
    """What the largest step, and the largest captured one, which has memory of its own, hold at a time."""
    batch, rows = limits.max_batch_size, limits.max_batch_size * limits.max_input_len
    return _held(network, batch, rows) + _held(network, batch, min(rows, captured_rows(network))) + OTHERS


def _held(network: Network, batch: int, tokens: int) -> int:
    """What a step holds at a time besides caches, and a weight that is widened for it."""
    sizes = {"tokens": tokens, "batch": batch, "rows": batch, "starts": batch + 1}
    last_uses, states = network.last_uses(), {*network.states.values()}
    held: dict[str, int] = {}
    most = 0
    for i, node in enumerate(network.nodes):
        for tensor in (network.tensors[name] for name in node.outputs if name not in states):
            shape = (sizes[size] if isinstance(size, str) else size for size in tensor.shape)
            held[tensor.name] = math.prod(shape) * tensor.dtype.itemsize
        most = max(most, sum(held.values()))
        for name in node.inputs.values():
            if last_uses[name] == i:
                held.pop(name, None)
    narrow = (x.nbytes * WIDENED.get(x.dtype, 0) for x in network.constants.values())
    return most + max(narrow, default=0)
