"""The layers that operations lower to: a thin vocabulary over `INetworkDefinition`.

Activations are `[tokens, ...]` as in the network. With `remove_input_padding` they stay packed and only attention pads,
by gathering with `pad_index` `[batch, query_len]` and back with `unpad_index` `[tokens]`; without it the engine's
inputs are `[batch, query_len]` and tokens = batch * query_len, padding included.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from trtbuild.engine.tensorrt_api import api
from trtbuild.network.lowering import Lowered

T = TypeVar("T")

RECEIVED, SENT = "received", "sent"  # an engine's input and output between stages of a pipeline


class Lowering:
    """An `INetworkDefinition` under construction. Every method adds layers and returns `ITensor`s."""

    def __init__(self, definition: Any, remove_input_padding: bool) -> None:
        self.trt = api()
        self.definition = definition
        self.packed = remove_input_padding
        self.buffers: dict[str, torch.Tensor] = {}  # TensorRT reads constants where they lie, until the build ends
        self.inputs: dict[str, Lowered] = {}
        self.sent: Lowered | None = None  # hidden states for the next stage of a pipeline
        self.collectives: dict[str, tuple[str, range]] = {}  # by layer: what its ranks do; the API does not tell
        self._once: dict[object, Any] = {}

    def dtype(self, dtype: torch.dtype) -> Any:
        trt = self.trt
        return {
            torch.float32: trt.float32,
            torch.float16: trt.float16,
            torch.bfloat16: trt.bfloat16,
            torch.int32: trt.int32,
            torch.int64: trt.int64,
            torch.bool: trt.bool,
            torch.int8: trt.int8,
            torch.float8_e4m3fn: trt.fp8,
            torch.uint8: trt.int4,  # two a byte, see `constant`
        }[dtype]

    def torch_dtype(self, x: Lowered) -> torch.dtype:
        """The floating-point type of a tensor."""
        dtypes = (torch.float32, torch.float16, torch.bfloat16)
        return next(dtype for dtype in dtypes if self.dtype(dtype) == x.dtype)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """`make()` the first time `key` is asked for, the same afterwards."""
        if key not in self._once:
            self._once[key] = make()
        return self._once[key]

    # Constants

    def constant(self, value: torch.Tensor, name: str | None = None) -> Lowered:
        """uint8 `[..., n / 2]` is int4 `[..., n]`, two a byte, the even element in the low nibble."""
        value = value.contiguous()
        shape = tuple(value.shape)
        if value.dtype == torch.uint8:
            shape = (*shape[:-1], 2 * shape[-1])
        weights = self.trt.Weights(self.dtype(value.dtype), value.data_ptr(), math.prod(shape))
        layer = self.definition.add_constant(shape, weights)
        if name:
            layer.name = name
        self.buffers[layer.name] = value
        return layer.get_output(0)

    def scalar(self, value: float, dtype: torch.dtype, rank: int) -> Lowered:
        """One number that broadcasts against tensors of `rank` dimensions."""
        return self.once(
            ("scalar", value, dtype, rank), lambda: self.constant(torch.full((1,) * rank, value, dtype=dtype))
        )

    # Arithmetic

    def elementwise(self, operation: str, a: Lowered, b: Lowered) -> Lowered:
        return self.definition.add_elementwise(a, b, getattr(self.trt.ElementWiseOperation, operation)).get_output(0)

    def unary(self, operation: str, x: Lowered) -> Lowered:
        return self.definition.add_unary(x, getattr(self.trt.UnaryOperation, operation)).get_output(0)

    def select(self, condition: Lowered, a: Lowered, b: Lowered) -> Lowered:
        """`a` where `condition`, else `b`; they broadcast."""
        return self.definition.add_select(condition, a, b).get_output(0)

    def sigmoid(self, x: Lowered) -> Lowered:
        return self.definition.add_activation(x, self.trt.ActivationType.SIGMOID).get_output(0)

    def reduce(self, operation: str, x: Lowered, axis: int, keep: bool = True) -> Lowered:
        return self.definition.add_reduce(x, getattr(self.trt.ReduceOperation, operation), 1 << axis, keep).get_output(
            0
        )

    def mean(self, x: Lowered, axis: int) -> Lowered:
        return self.reduce("AVG", x, axis)

    def matmul(self, a: Lowered, b: Lowered, transpose_b: bool = False) -> Lowered:
        op = self.trt.MatrixOperation
        return self.definition.add_matrix_multiply(a, op.NONE, b, op.TRANSPOSE if transpose_b else op.NONE).get_output(
            0
        )

    def cast(self, x: Lowered, dtype: torch.dtype) -> Lowered:
        wanted = self.dtype(dtype)
        return x if x.dtype == wanted else self.definition.add_cast(x, wanted).get_output(0)

    def cast_like(self, x: Lowered, like: Lowered) -> Lowered:
        return x if x.dtype == like.dtype else self.definition.add_cast(x, like.dtype).get_output(0)

    def add_bias(self, product: Lowered, bias: Lowered | None = None) -> Lowered:
        """`[tokens, out]` plus an `[out]` bias, if there is one, in the product's dtype."""
        if bias is None:
            return product
        return self.elementwise("SUM", product, self.cast_like(self.reshape(bias, (1, -1)), product))

    # Quantization. A scale is one number (`[]` or `[1]`), `[n]` for the n indices of `axis`, or, to dequantize alone,
    # of the rank of what it scales: one number a block, in the dtype of the result.

    def quantize(self, x: Lowered, scale: Lowered, like: Lowered, axis: int | None = None) -> Lowered:
        """`x / scale` rounded to the 8-bit type of `like`."""
        return self._along(self.definition.add_quantize(x, scale, like.dtype), axis)

    def dequantize(self, x: Lowered, scale: Lowered, like: Lowered, axis: int | None = None) -> Lowered:
        """`x * scale` in the dtype of `like`."""
        return self._along(self.definition.add_dequantize(x, scale, like.dtype), axis)

    def _along(self, layer: Any, axis: int | None) -> Lowered:
        if axis is not None:
            layer.axis = axis
        return layer.get_output(0)

    def quantized_matmul(self, x: Lowered, x_scale: Lowered, weight: Lowered, weight_scale: Lowered) -> Lowered:
        """`x @ weight.T` in the dtype of `x`, which is first rounded to the 8-bit type of `weight` `[out, in]`.

        TensorRT makes of it one product of that type with float32 sums, and multiplies those by both scales.
        """
        x = self.dequantize(self.quantize(x, x_scale, like=weight), x_scale, like=x)
        return self.matmul(x, self.dequantize(weight, weight_scale, like=x, axis=0), transpose_b=True)

    # Shapes

    def gather(self, x: Lowered, indices: Lowered, axis: int = 0) -> Lowered:
        """Rows of `x`, or what else lies along an axis."""
        return self.definition.add_gather(x, indices, axis).get_output(0)

    def concatenate(self, tensors: Sequence[Lowered], axis: int) -> Lowered:
        layer = self.definition.add_concatenation(tensors)
        layer.axis = axis
        return layer.get_output(0)

    def reshape(
        self,
        x: Lowered,
        shape: tuple[int, ...],
        before: tuple[int, ...] | None = None,
        after: tuple[int, ...] | None = None,
    ) -> Lowered:
        """`shape` may hold one -1 and zeros (copy that dimension); optional transposes before and after."""
        layer = self.definition.add_shuffle(x)
        if before:
            layer.first_transpose = before
        layer.reshape_dims = shape
        if after:
            layer.second_transpose = after
        return layer.get_output(0)

    def sizes(self, tensor_name: str, x: Lowered, axis: int) -> Lowered:
        """One dimension of `x` as a shape tensor `[1]`."""

        def make() -> Lowered:
            shape = self.definition.add_shape(x).get_output(0)
            return self.definition.add_slice(shape, (axis,), (1,), (1,)).get_output(0)

        return self.once(("size", tensor_name, axis), make)

    def shape(self, *sizes: int | Lowered) -> Lowered:
        """A shape tensor from numbers and `[1]` shape tensors."""
        parts = [self._integer(size) if isinstance(size, int) else size for size in sizes]
        return self.concatenate(parts, axis=0)

    def _integer(self, value: int) -> Lowered:
        return self.once(("integer", value), lambda: self.constant(torch.tensor([value], dtype=torch.int64)))

    @property
    def _by_token(self) -> str:
        """An input that has a number a token; a stage that is not the first has no ids."""
        return "input_ids" if "input_ids" in self.inputs else "position_ids"

    @property
    def tokens(self) -> Lowered:
        """The number of tokens as a shape tensor."""
        if self.packed:
            return self.sizes(self._by_token, self.inputs[self._by_token], 0)
        return self.once("tokens", lambda: self.elementwise("PROD", self.batch, self.query_len))

    @property
    def batch(self) -> Lowered:
        name = "pad_index" if self.packed else self._by_token
        return self.sizes(name, self.inputs[name], 0)

    @property
    def query_len(self) -> Lowered:
        name = "pad_index" if self.packed else self._by_token
        return self.sizes(name, self.inputs[name], 1)

    def columns(self, x: Lowered, start: int, size: int) -> Lowered:
        """`x[:, start : start + size]` of `[tokens, width]` or `[rows, width]`."""
        layer = self.definition.add_slice(x, (0, start), (0, 0), (1, 1))
        layer.set_input(2, self.once(("columns", x.name, size), lambda: self.shape(self.sizes(x.name, x, 0), size)))
        return layer.get_output(0)

    # Ranks. A session gives a stage's ranks a communicator of their own. There is no send and receive: what passes
    # between stages are inputs and outputs.

    def all_reduce(self, x: Lowered, ranks: range) -> Lowered:
        """The sum of what all `ranks` have."""
        return self._collective("ALL_REDUCE", "SUM", x, ranks)

    def all_gather(self, x: Lowered, ranks: range) -> Lowered:
        """`[rows, n]` of each of `ranks` to `[rows, n * ranks]`. TensorRT's layer puts rows below rows."""
        size, columns = len(ranks), x.shape[1]
        rows = self.reshape(self._collective("ALL_GATHER", "NONE", x, ranks), (size, -1, columns), after=(1, 0, 2))
        return self.reshape(rows, (-1, size * columns))

    def _collective(self, operation: str, reduction: str, x: Lowered, ranks: range) -> Lowered:
        trt = self.trt
        layer = self.definition.add_dist_collective(
            x, getattr(trt.CollectiveOperation, operation), getattr(trt.ReduceOperation, reduction), -1, None
        )
        layer.num_ranks = len(ranks)
        self.collectives[layer.name] = operation, ranks
        return layer.get_output(0)

    def received(self, dtype: torch.dtype, columns: int) -> Lowered:
        """The hidden states of the stage before, `[tokens, columns]`: an input of the engine."""
        self.inputs[RECEIVED] = self.definition.add_input(RECEIVED, self.dtype(dtype), (-1, columns))
        return self.inputs[RECEIVED]

    def send(self, x: Lowered) -> None:
        """Makes the hidden states for the next stage an output of the engine."""
        self.sent = x

    # Sequences

    def pad(self, x: Lowered, *shape: int) -> Lowered:
        """`[tokens, ...]` to `[batch, query_len, *shape]`; what padding holds is never looked at."""
        if self.packed:
            return self.reshape(self.gather(x, self.inputs["pad_index"]), (0, 0, *shape))
        layer = self.definition.add_shuffle(x)
        layer.set_input(1, self.once(("pad", shape), lambda: self.shape(self.batch, self.query_len, *shape)))
        return layer.get_output(0)

    def heads(self, x: Lowered, head_dim: int) -> Lowered:
        """`[tokens, heads * head_dim]` to `[batch, heads, query_len, head_dim]`."""
        layer = self.definition.add_shuffle(self.pad(x, x.shape[1] // head_dim, head_dim))
        layer.first_transpose = (0, 2, 1, 3)
        return layer.get_output(0)

    def padded_columns(self, x: Lowered, start: int, size: int) -> Lowered:
        """Columns of `[tokens, width]` as `[batch, query_len, size]`, made once."""
        return self.once(("padded", x.name, start), lambda: self.pad(self.columns(x, start, size), size))

    def merge_heads(self, x: Lowered, width: int) -> Lowered:
        """`[batch, heads, query_len, head_dim]` to `[tokens, width]`."""
        x = self.reshape(x, (-1, width), before=(0, 2, 1, 3))
        return self.gather(x, self.inputs["unpad_index"]) if self.packed else x

    def rotate(self, x: Lowered, cos: Lowered, sin: Lowered) -> Lowered:
        """RoPE on halves: `x` `[batch, heads, query_len, head_dim]`, cos and sin `[batch, query_len, head_dim / 2]`."""
        return self.definition.add_rotary_embedding(x, cos, sin, False, x.shape[3]).get_output(0)

    def scale(self, x: Lowered, factor: float) -> Lowered:
        return self.elementwise("PROD", x, self.scalar(factor, self.torch_dtype(x), rank=4))

    def scale_tokens(self, x: Lowered, factors: Lowered) -> Lowered:
        """`x` `[batch, heads, query_len, head_dim]` times a factor a token, `[tokens]`, in its dtype."""
        padded = self.once(("padded", factors.name), lambda: self.reshape(self.pad(factors, 1), (0, 1, -1, 1)))
        return self.elementwise("PROD", x, padded)

    def update_cache(self, cache: Lowered, new: Lowered, write_indices: Lowered) -> Lowered:
        """Writes `[batch, kv_heads, query_len, head_dim]` into the cache from each sequence's write index on."""
        return self.definition.add_kv_cache_update(cache, new, write_indices, self.trt.KVCacheMode.LINEAR).get_output(0)

    def extend_cache(
        self, cache: Lowered, rows: Lowered, scale: Lowered, past_lengths: Lowered, like: Lowered
    ) -> Lowered:
        """What an 8-bit cache `[batch, kv_heads, max_length, head_dim]` stands for once `rows` follow what it holds.

        `rows` `[batch, kv_heads, query_len, head_dim]`, quantized as the cache is with `scale` `[kv_heads]`; the result
        is in the dtype of `like`. The cache itself is left alone, because `update_cache` takes no 8-bit types and any
        other way to write into it copies all of it: whoever runs the engine writes the rows.
        """
        old, slots = self.once(("slots", past_lengths.name), lambda: self._slots(past_lengths, cache.shape[2]))
        layer = self.definition.add_gather(self.dequantize(rows, scale, like, axis=1), slots, 2)
        layer.num_elementwise_dims = 1
        return self.select(old, self.dequantize(cache, scale, like, axis=1), layer.get_output(0))

    def _slots(self, past_lengths: Lowered, max_length: int) -> tuple[Lowered, Lowered]:
        """Which cache positions hold earlier tokens, `[batch, 1, max_length, 1]`, and this step's row for the others.

        The rows are int32 `[batch, max_length]`. Beyond a sequence's end it is the last one; no query looks there.
        """
        positions = self.constant(torch.arange(max_length, dtype=torch.int32).reshape(1, -1))
        ahead = self.elementwise("SUB", positions, self.reshape(past_lengths, (-1, 1)))
        zero, one = (self.scalar(n, torch.int32, rank=2) for n in (0, 1))
        last = self.elementwise("SUB", self.reshape(self.cast(self.query_len, torch.int32), (1, 1)), one)
        rows = self.elementwise("MIN", self.elementwise("MAX", ahead, zero), last)
        return self.reshape(self.elementwise("LESS", ahead, zero), (0, 1, -1, 1)), rows

    def attend(
        self, q: Lowered, keys: Lowered, values: Lowered, position_ids: Lowered, slopes: Lowered | None = None
    ) -> Lowered:
        """Attention of scaled queries over whole caches, masked by position; ALiBi with `slopes` `[heads]`."""
        trt = self.trt
        layer = self.definition.add_attention_v2(
            q, keys, values, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
        )
        max_length = keys.shape[2]
        layer.mask = self.once(
            "mask",
            lambda: (
                self._mask(position_ids, max_length)
                if slopes is None
                else self._biased_mask(position_ids, slopes, max_length, like=q)
            ),
        )
        layer.key_value_lengths = self.inputs["kv_lengths"]
        layer.decomposable = True
        return layer.get_output(0)

    def _mask(self, position_ids: Lowered, max_length: int) -> Lowered:
        """`[batch, 1, query_len, max_length]`: true where the key's position is not after the query's."""
        queries, keys = self._positions(position_ids, max_length)
        return self.elementwise("LESS", keys, self.elementwise("SUM", queries, self.scalar(1, torch.int32, rank=4)))

    def _biased_mask(self, position_ids: Lowered, slopes: Lowered, max_length: int, like: Lowered) -> Lowered:
        """ALiBi's biases in the dtype of `like`, `[batch, heads, query_len, max_length]`.

        Where `_mask` is false, half the dtype's lowest number: minus infinity can become NaN in a softmax that goes
        block by block and meets a block that is masked as a whole, and the lowest number may overflow with a score.
        """
        queries, keys = self._positions(position_ids, max_length)
        distances = self.cast(self.elementwise("SUB", keys, queries), torch.float32)
        bias = self.elementwise("PROD", distances, self.reshape(slopes, (1, -1, 1, 1)))
        dtype = self.torch_dtype(like)
        masked = self.scalar(torch.finfo(dtype).min / 2, dtype, rank=4)
        allowed = self._mask(position_ids, max_length)
        return self.select(allowed, self.cast(bias, dtype), masked)

    def _positions(self, position_ids: Lowered, max_length: int) -> tuple[Lowered, Lowered]:
        """Of the queries, `[batch, 1, query_len, 1]`, and of the keys, `[1, 1, 1, max_length]`."""

        def make() -> tuple[Lowered, Lowered]:
            queries = self.reshape(self.pad(position_ids, 1), (0, 1, -1, 1))
            return queries, self.constant(torch.arange(max_length, dtype=torch.int32).reshape(1, 1, 1, -1))

        return self.once("positions", make)
