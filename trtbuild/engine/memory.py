"""What a portable engine needs of a GPU's memory: one that does not fit is refused before its weights are loaded."""

import math
from bisect import bisect
from dataclasses import dataclass, replace

import torch

from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.network import Network
from trtbuild.network.step import LAUNCHED_ROWS, captured_rows

OTHERS = 512 << 20  # bytes that libraries, kernels and the nodes of captured graphs take
SPARE = 128  # one such part of what is free is not for pages
WIDENED = {torch.uint8: 4, torch.int8: 2, torch.float8_e4m3fn: 2}  # times that a weight's 16-bit copy is larger


@dataclass(frozen=True)
class Memory:
    """Bytes: of weights, of the KV cache at the largest batch, and of what the largest step holds besides."""

    weights: int
    caches: int
    step: int

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.step


def needed(network: Network, limits: BuildLimits) -> Memory:
    """What a rank's engine takes on a GPU; nothing of the network is loaded.

    The largest step has `max_batch_size` prompts of `max_input_len` tokens, or as many as run at a time, and the logits
    of one token each.
    """
    batch, rows = limits.max_batch_size, limits.max_batch_size * limits.max_input_len
    step = launched_memory(network, batch, rows) + captured_memory(network, batch, rows) + OTHERS
    weights = sum(constant.nbytes for constant in network.constants.values())
    return Memory(weights, batch * limits.max_length * bytes_per_position(network), step + 2 * _widened(network))


def largest_batch(network: Network, limits: BuildLimits, free: int, at_most: int | None = None) -> int:
    """How many sequences of the limits' lengths fit into `free` bytes at a time, prompts and all; 0 if not even one."""
    at_most = at_most or free // (limits.max_length * bytes_per_position(network))
    sizes = range(1, at_most + 1)
    return bisect(sizes, False, key=lambda n: needed(network, replace(limits, max_batch_size=n)).total > free)


def check_memory(network: Network, limits: BuildLimits, free: int) -> None:
    """Raises `UserError` unless weights, caches and the largest step that the limits allow fit into `free` bytes."""
    memory = needed(network, limits)
    if memory.total <= free:
        return
    batch = largest_batch(network, limits, free, limits.max_batch_size)
    one = replace(limits, max_batch_size=1)
    lengths = range(1, limits.max_input_len)
    length = bisect(lengths, False, key=lambda n: needed(network, replace(one, max_input_len=n)).total > free)
    right = "the weights alone need fewer bits or more GPUs"
    if batch or length:
        change = f"max-batch-size {batch}" if batch else f"max-batch-size 1 --max-input-len {length}"
        right = f"build it with --{change}"
    sizes = memory.total, memory.weights, memory.caches, memory.step, free
    whole, of_weights, of_caches, of_step, there = (f"{size / 1e9:.1f}" for size in sizes)
    raise UserError(
        f"the engine needs {whole} GB of GPU memory (weights {of_weights}, caches of {limits.max_batch_size} x "
        f"{limits.max_length} positions {of_caches}, the largest step {of_step}) and {there} are free; {right}"
    )


def bytes_per_position(network: Network) -> int:
    """Of keys and values of one position of one sequence, in all of a rank's layers."""
    tensors = [network.tensors[name] for name in network.states]
    return sum(tensor.size(1) * tensor.size(3) * tensor.dtype.itemsize for tensor in tensors)


def _widened(network: Network) -> int:
    """The largest 16-bit copy of a weight."""
    return max((x.nbytes * WIDENED.get(x.dtype, 0) for x in network.constants.values()), default=0)


def room_for_pages(network: Network, sequences: int, tokens: int, drawing: int, free: int) -> int:
    """Bytes of `free` that caches may take beside steps of so many sequences, and of so many tokens of prompts.

    `drawing`: what sampling takes for a sequence.
    """
    steps = launched_memory(network, sequences, max(sequences, tokens)) + captured_memory(network, sequences)
    steps += sequences * drawing
    return free - free // SPARE - steps - 2 * _widened(network) - OTHERS


def launched_memory(network: Network, batch: int, rows: int) -> int:
    """What torch takes for steps of up to so many sequences and rows.

    A half more than is held at a time: it cuts what others left to a tensor's size, and the rest may fit nothing.
    """
    return held(network, batch, min(rows, LAUNCHED_ROWS)) * 3 // 2


def captured_memory(network: Network, batch: int, rows: int = LAUNCHED_ROWS) -> int:
    """The same of those that are captured; it is apart from the others'."""
    return launched_memory(network, batch, max(batch, min(rows, captured_rows(network))))


def held(network: Network, batch: int, tokens: int) -> int:
    """What a step's operations hand on and hold at a time, without caches and weights."""
    sizes = {"tokens": tokens, "batch": batch, "rows": batch, "starts": batch + 1}
    last_uses, states = network.last_uses(), {*network.states.values()}
    there: dict[str, int] = {}
    now = most = 0
    for i, node in enumerate(network.nodes):
        for tensor in (network.tensors[name] for name in node.outputs if name not in states):
            shape = (sizes[size] if isinstance(size, str) else size for size in tensor.shape)
            there[tensor.name] = math.prod(shape) * tensor.dtype.itemsize
            now += there[tensor.name]
        most = max(most, now)
        for name in node.inputs.values():
            if last_uses[name] == i:
                now -= there.pop(name, 0)
    return most
