"""Causal self-attention with grouped heads, RoPE or ALiBi and a KV cache: the one operation that knows sequences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from trtbuild.network.network import Op, Tensor
from trtbuild.tensors.rounding import quantize


@dataclass(frozen=True)
class Attention(Op):
    """Attention of packed tokens over each sequence's cache (arXiv 1706.03762; grouped heads 2305.13245).

    Sequence `b` owns the rows `query_starts[b] .. query_starts[b + 1]` of the packed inputs and has
    `past_lengths[b]` positions in its cache, to which this step's keys and values are appended. Query head `h` reads
    KV head `h // (num_heads / num_kv_heads)`; scores are scaled by `head_dim ** -0.5`.

    `position` is "rope", which rotates q and k (arXiv 2104.09864) and takes cos and sin, or "alibi" (2108.12409), which
    takes `slopes` `[num_heads]` and adds `slope * (key position - query position)` to the scores. With `logn` each
    token's query is multiplied by a factor. These inputs follow the ones that are always there, scales come last.

    Caches in int8 or float8_e4m3fn hold `x / scale`, with a scale a KV head for keys and another for values. Attention
    reads what they hold also for this step's own tokens, so that a prompt is treated alike in one step or in many.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    position: str = "rope"
    logn: bool = False

    @property
    def sizes(self) -> list[int]:
        """Widths of q, k and v in the fused projection."""
        return [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]

    def options(self, extra: Sequence) -> tuple[Sequence, Any, Any, Sequence]:
        """What follows the inputs that are always there: (cos, sin) or (), slopes or None, log-n or None, scales or ().

        Of any kind: the network's tensors, torch's, TensorRT's.
        """
        rotary = 2 if self.position == "rope" else 0
        logn = rotary or 1
        scales = logn + self.logn
        return extra[:rotary], None if rotary else extra[0], extra[logn] if self.logn else None, extra[scales:]

    def infer(self, qkv, key_cache, value_cache, position_ids, query_starts, past_lengths, *extra):
        tokens, width = qkv.shape
        rotary, slopes, logn, scales = self.options(extra)
        if (
            self.position not in ("rope", "alibi")
            or any(x.shape != (tokens, self.head_dim) for x in rotary)
            or (slopes and slopes.shape != (self.num_heads,))
            or (logn and (logn.dtype, logn.shape) != (qkv.dtype, (tokens,)))
        ):
            raise ValueError(f"attention {self} of {qkv} with {extra}")
        if bool(scales) != (key_cache.dtype.itemsize == 1) or any(s.shape != (self.num_kv_heads,) for s in scales):
            raise ValueError(f"attention {self} with cache {key_cache} and scales {scales}")
        if width != sum(self.sizes) or key_cache.shape != value_cache.shape:
            raise ValueError(f"attention {self} of {qkv} with caches {key_cache}, {value_cache}")
        if key_cache.shape[1::2] != (self.num_kv_heads, self.head_dim):
            raise ValueError(f"attention {self} with cache {key_cache}")
        return [
            (qkv.dtype, (tokens, self.sizes[0])),
            (key_cache.dtype, key_cache.shape),
            (value_cache.dtype, value_cache.shape),
        ]

    def reference(self, qkv, key_cache, value_cache, position_ids, query_starts, past_lengths, *extra):
        rotary, slopes, logn, scales = self.options(extra)
        q, k, v = self.heads(qkv, rotary, logn)
        key_cache, value_cache = key_cache.clone(), value_cache.clone()
        output = torch.empty_like(q)
        group = self.num_heads // self.num_kv_heads
        for b in range(len(past_lengths)):
            rows = slice(int(query_starts[b]), int(query_starts[b + 1]))
            past, total = int(past_lengths[b]), int(past_lengths[b]) + rows.stop - rows.start
            both = []
            for new, cache, scale in zip((k, v), (key_cache, value_cache), scales or (None, None), strict=True):
                cache[b, :, past:total] = _stored(new[rows].transpose(0, 1), cache.dtype, scale)
                both.append(_loaded(cache[b, :, :total], q.dtype, scale).repeat_interleave(group, 0))
            keys, values = both
            scores = q[rows].transpose(0, 1) @ keys.transpose(1, 2) * self.head_dim**-0.5
            distances = torch.arange(total, device=q.device) - torch.arange(past, total, device=q.device)[:, None]
            if slopes is not None:
                scores += (slopes[:, None, None] * distances).to(q.dtype)
            weights = scores.masked_fill(distances > 0, float("-inf")).softmax(-1)
            output[rows] = (weights @ values).transpose(0, 1)
        return output.flatten(1), key_cache, value_cache

    def portable(self, step, qkv, key_cache, value_cache, position_ids, query_starts, past_lengths, *extra):
        """Equal to `reference`, except that the caches are updated in place.

        The context phase (`step.lengths` known to the host, empty caches) runs one fused causal attention a sequence,
        or one for the batch where all lengths are equal. The generation phase reads the first `step.kv_bound`
        positions of the cache and masks those beyond each sequence's own.
        """
        rotary, slopes, logn, scales = self.options(extra)
        q, k, v = self.heads(qkv, rotary, logn)
        if scales:
            stored = [_stored(new.transpose(0, 1), key_cache.dtype, s) for new, s in zip((k, v), scales, strict=True)]
            k, v = (x.transpose(0, 1) for x in stored)
        if step.lengths is None:
            output = self._generation(step, q, k, v, key_cache, value_cache, position_ids, slopes, scales)
            return output, key_cache, value_cache
        lengths = step.lengths
        biases = None if slopes is None else step.alibi(position_ids, slopes, self.num_kv_heads, q.dtype)
        batches = [lengths] if len(set(lengths)) == 1 else [[n] for n in lengths]
        outputs, b, row = [], 0, 0
        for batch in batches:
            count, n = len(batch), batch[0]
            rows = slice(row, row + count * n)
            queries, keys, values = (x[rows].unflatten(0, (count, n)).transpose(1, 2) for x in (q, k, v))
            key_cache[b : b + count, :, :n] = keys
            value_cache[b : b + count, :, :n] = values
            if scales:
                keys, values = (_loaded(x, q.dtype, s) for x, s in zip((keys, values), scales, strict=True))
            masked = {"is_causal": True} if biases is None else {"attn_mask": biases[:, :, :n, :n]}
            output = _attend(queries, keys, values, **masked, enable_gqa=True)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
            b, row = b + count, row + count * n
        return torch.cat(outputs).flatten(1), key_cache, value_cache

    def _generation(self, step, q, k, v, key_cache, value_cache, position_ids, slopes, scales):
        sequences, positions = step.slots(position_ids)
        key_cache[sequences, :, positions] = k
        value_cache[sequences, :, positions] = v
        if q.is_cuda and _has_kernel(q, key_cache):
            from trtbuild.kernels.decode_attention import decode_attention

            return decode_attention(
                q, key_cache, value_cache, *(scales or (None, None)), position_ids, step.kv_bound, slopes
            )
        keys, values = key_cache[:, :, : step.kv_bound], value_cache[:, :, : step.kv_bound]
        if scales:
            keys, values = (_loaded(x, q.dtype, s) for x, s in zip((keys, values), scales, strict=True))
        grouped = q.unflatten(1, (self.num_kv_heads, -1))  # the heads of a group are the queries of its KV head
        if slopes is None:
            mask = step.mask(position_ids, q.dtype)
        else:
            mask = step.alibi(position_ids, slopes, self.num_kv_heads, q.dtype)
        return _attend(grouped, keys, values, attn_mask=mask).flatten(1)

    def heads(self, qkv, rotary=(), logn=None):
        """q, k, v as `[tokens, heads, head_dim]`; q and k rotated, q times the log-n factors, where there are such."""
        heads = qkv.unflatten(1, (-1, self.head_dim))
        qk, v = heads[:, : -self.num_kv_heads], heads[:, -self.num_kv_heads :]
        if rotary:
            cos, sin = rotary
            first, second = qk.chunk(2, -1)
            qk = torch.addcmul(qk * cos[:, None], torch.cat((second, first), -1), sin[:, None])
        q, k = qk[:, : self.num_heads], qk[:, self.num_heads :]
        return q if logn is None else q * logn[:, None, None], k, v

    def to_tensorrt(self, lowering, qkv, key_cache, value_cache, position_ids, query_starts, past_lengths, *extra):
        """Padded attention with fused layers: pad, rotate, append to the cache, attend, unpad.

        TensorRT-RTX refuses packed attention. Causality and the ragged batch are one mask made from the positions,
        boolean or ALiBi's biases, so nothing rests on how `key_value_lengths` shifts the built-in causal masks. It also
        refuses to update 8-bit caches: in their place it returns what this step adds to them, `[batch, kv_heads,
        query_len, head_dim]`, to be written at `past_lengths`.
        """
        rotary, slopes, logn, scales = self.options(extra)
        q, k, v = (
            lowering.heads(lowering.columns(qkv, start, size), self.head_dim)
            for start, size in zip((0, self.sizes[0], sum(self.sizes[:2])), self.sizes, strict=True)
        )
        if rotary:
            half = self.head_dim // 2
            angles = [lowering.padded_columns(x, start, half) for x, start in zip(rotary, (0, half), strict=True)]
            q, k = lowering.rotate(q, *angles), lowering.rotate(k, *angles)
        if logn is not None:
            q = lowering.scale_tokens(q, logn)
        caches = key_cache, value_cache
        if scales:
            presents = [lowering.quantize(x, s, like=key_cache, axis=1) for x, s in zip((k, v), scales, strict=True)]
            read = [
                lowering.extend_cache(cache, rows, scale, past_lengths, like=q)
                for cache, rows, scale in zip(caches, presents, scales, strict=True)
            ]
        else:
            presents = [lowering.update_cache(cache, x, past_lengths) for cache, x in zip(caches, (k, v), strict=True)]
            read = presents
        output = lowering.attend(lowering.scale(q, self.head_dim**-0.5), *read, position_ids, slopes)
        return lowering.merge_heads(output, self.sizes[0]), *presents


def _has_kernel(q: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether the decode kernel takes these: 16-bit queries, head sizes that are powers of two, FP8 on GPUs with it."""
    head_dim = q.shape[-1]
    fp8_missing = cache.dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(q.device) < (8, 9)
    return q.dtype != torch.float32 and head_dim >= 16 and head_dim & (head_dim - 1) == 0 and not fp8_missing


def _stored(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """Keys or values `[kv_heads, tokens, head_dim]` as the cache holds them."""
    return x.to(dtype) if scale is None else quantize(x.float(), scale[:, None, None], dtype)


def _loaded(cache: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """What a cache `[..., kv_heads, positions, head_dim]` stands for, in `dtype`."""
    return cache.to(dtype) if scale is None else cache.to(dtype) * scale.to(dtype)[:, None, None]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """Fused attention; in float32 for float16 on a CPU, where torch's own float16 is several times slower."""
    if q.dtype == torch.float16 and not q.is_cuda:
        if (mask := options.get("attn_mask")) is not None:
            options["attn_mask"] = mask.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)


def attention(
    qkv: Tensor,
    positional: Sequence[Tensor],
    cache: Sequence[Tensor],
    position_ids: Tensor,
    query_starts: Tensor,
    past_lengths: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    logn: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`[tokens, (heads + 2 kv_heads) * head_dim]` fused q | k | v to `[tokens, heads * head_dim]` and the new caches.

    `positional`: RoPE's cos and sin, `[tokens, head_dim]`, or ALiBi's slopes, float32 `[heads]`; `cache`: keys and
    values, `[batch, kv_heads, max_length, head_dim]`, and where they are 8 bits wide the scales of keys and of values,
    float32 `[kv_heads]`; `position_ids` `[tokens]`, `query_starts` `[batch + 1]`, `past_lengths` `[batch]`, all int32;
    `logn`: factors of the queries, `[tokens]`.
    """
    op = Attention(num_heads, num_kv_heads, head_dim, "rope" if len(positional) == 2 else "alibi", logn is not None)
    keys, values, *scales = cache
    extra = (*positional, *(() if logn is None else (logn,)), *scales)
    return qkv.network.add(op, qkv, keys, values, position_ids, query_starts, past_lengths, *extra)
