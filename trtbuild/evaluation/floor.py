"""The least time that a step can take: what it must read at a GPU's bandwidth, what it must multiply at its rates."""

from collections import Counter

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.memory import bytes_per_position
from trtbuild.evaluation.gpu_table import GPU
from trtbuild.linear.dense import DenseLinear
from trtbuild.linear.format import WeightFormat
from trtbuild.network import Network
from trtbuild.network.ops.attention import Attention


def bytes_per_step(
    weight_bytes: int, per_position: int, batch_size: int, input_len: int, output_len: int, parts: int = 1
) -> float:
    """What an average generation step reads, one after the other: each weight once and the caches' filled part.

    Of ranks that share a layer what one reads. Stages that have `parts` of the batch at the same time read their
    weights once a part, which together is all weights once, and beside each other a part's caches.
    """
    return weight_bytes + batch_size * (input_len + output_len / 2) * per_position / parts


def decode_floor(
    stages: list[Network], mapping: Mapping, gpu: GPU, batch_size: int, input_len: int, output_len: int
) -> float:
    """Seconds of an average generation step; `stages`: a rank's network of each."""
    weights = sum(network.weight_bytes for network in stages)
    per_position = sum(map(bytes_per_position, stages))
    parts = min(mapping.pp_size, batch_size)
    read = bytes_per_step(weights, per_position, batch_size, input_len, output_len, parts) / gpu.bandwidth
    return max(read, sum(_seconds(operations(network, batch_size, 1), gpu) for network in stages))


def context_floor(stages: list[Network], gpu: GPU, batch_size: int, input_len: int) -> float:
    """Seconds until prompts have their first tokens: of the stage that takes longest, since they work side by side."""
    return max(
        max(_seconds(operations(network, batch_size, input_len), gpu), network.weight_bytes / gpu.bandwidth)
        for network in stages
    )


def operations(network: Network, batch_size: int, input_len: int) -> Counter[str]:
    """Multiplications and additions of prompts of one length in products and attention, by what is multiplied.

    That is an 8-bit type where activations are rounded too, else `float32` or, for both 16-bit types, `float16`. Of
    attention half of all pairs of tokens, which is what a causal one needs.
    """
    rows = {"tokens": batch_size * input_len, "rows": batch_size}
    pairs = batch_size * input_len * (input_len + 1) // 2
    found: Counter[str] = Counter()
    for node in network.nodes:
        if isinstance(node.op, DenseLinear | WeightFormat):
            x, out = network.tensors[node.inputs["x"]], network.tensors[node.outputs[0]].size(1)
            dtype: str = _float(x.dtype.itemsize)
            if isinstance(node.op, WeightFormat) and node.op.activations != "16bit":
                dtype = node.op.dtype
            found[dtype] += 2 * rows[str(x.shape[0])] * x.size(1) * out
        elif isinstance(node.op, Attention):
            q = network.tensors[node.inputs["q"]]
            found[_float(q.dtype.itemsize)] += 2 * 2 * pairs * q.size(1) * q.size(2)
    return found


def _seconds(operations: Counter[str], gpu: GPU) -> float:
    return sum(count / gpu.rate(dtype) for dtype, count in operations.items())


def _float(itemsize: int) -> str:
    return "float32" if itemsize == 4 else "float16"
