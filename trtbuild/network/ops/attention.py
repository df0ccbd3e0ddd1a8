"""Causal self-attention with grouped heads, ALiBi and a KV cache: the one operation that knows sequences."""

from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor
from trtbuild.network.step import Step
from trtbuild.tensors.cpu import multiplies
from trtbuild.tensors.rounding import quantize, widened

T = TypeVar("T")


@dataclass(frozen=True)
class Attention(Op):
    """Attention of packed tokens over each sequence's cache (arXiv 1706.03762; grouped heads 2305.13245).

    Sequence `b` owns the rows `query_starts[b] .. query_starts[b + 1]` of q, k and v and has `past_lengths[b]`
    positions in its cache, to which this step's keys and values are appended. Query head `h` reads KV head
    `h // (heads / kv_heads)`; scores are scaled by `head_dim ** -0.5`. ALiBi (2108.12409) has `slopes` `[heads]` and
    adds `slope * (key position - query position)` to them.

    Caches in int8 or float8_e4m3fn hold `x / scale`, with a scale a KV head for keys and another for values. Attention
    reads what they hold also for this step's own tokens, so that a prompt is treated alike in one step or in many.

    Outputs are the attended values and the new caches. Without caches, which is how a model is traversed but never an
    engine, past lengths are 0 and the attended values are the one output.
    """

    def infer(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position_ids: Tensor,
        query_starts: Tensor,
        past_lengths: Tensor,
        key_cache: Tensor | None = None,
        value_cache: Tensor | None = None,
        slopes: Tensor | None = None,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
    ) -> list[Spec]:
        tokens, heads, head_dim, kv_heads = q.shape[0], q.size(1), q.size(2), k.size(1)
        if k.shape != v.shape or k.shape != (tokens, kv_heads, head_dim) or heads % kv_heads:
            raise ValueError(f"attention of {q} over {k}, {v}")
        if slopes and slopes.shape != (heads,):
            raise ValueError(f"attention of {q} with {slopes}")
        output = q.dtype, (tokens, heads * head_dim)
        caches = [cache for cache in (key_cache, value_cache) if cache]
        scales = [scale for scale in (key_scale, value_scale) if scale]
        if not caches and not scales:
            return [output]
        if len(caches) != 2 or any(c.shape[1::2] != (kv_heads, head_dim) or c.shape != caches[0].shape for c in caches):
            raise ValueError(f"attention of {q} over {k} with caches {caches}")
        wanted = 2 if caches[0].dtype.itemsize == 1 else 0
        if len(scales) != wanted or any(scale.shape != (kv_heads,) for scale in scales):
            raise ValueError(f"attention with caches {caches} and scales {scales}")
        return [output, *((cache.dtype, cache.shape) for cache in caches)]

    def reference(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position_ids: torch.Tensor,
        query_starts: torch.Tensor,
        past_lengths: torch.Tensor,
        key_cache: torch.Tensor | None = None,
        value_cache: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        caches, scales = _both(key_cache, value_cache), _both(key_scale, value_scale)
        caches = caches and (caches[0].clone(), caches[1].clone())
        output = torch.empty_like(q)
        group = q.shape[1] // k.shape[1]
        for b in range(len(past_lengths)):
            rows = slice(int(query_starts[b]), int(query_starts[b + 1]))
            past, total = int(past_lengths[b]), int(past_lengths[b]) + rows.stop - rows.start
            both = [x[rows].transpose(0, 1) for x in (k, v)]
            if caches:
                for i, (cache, scale) in enumerate(zip(caches, scales or (None, None), strict=True)):
                    cache[b, :, past:total] = _stored(both[i], cache.dtype, scale)
                    both[i] = _loaded(cache[b, :, :total], q.dtype, scale)
            keys, values = (x.repeat_interleave(group, 0) for x in both)
            scores = q[rows].transpose(0, 1) @ keys.transpose(1, 2) * q.shape[-1] ** -0.5
            distances = torch.arange(total, device=q.device) - torch.arange(past, total, device=q.device)[:, None]
            if slopes is not None:
                scores += (slopes[:, None, None] * distances).to(q.dtype)
            weights = scores.masked_fill(distances > 0, float("-inf")).softmax(-1)
            output[rows] = (weights @ values).transpose(0, 1)
        return (output.flatten(1), *caches) if caches else output.flatten(1)

    def portable(
        self,
        step: Step,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        position_ids: torch.Tensor,
        query_starts: torch.Tensor,
        past_lengths: torch.Tensor,
        key_cache: torch.Tensor | None = None,
        value_cache: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Equal to `reference`, except that the caches are updated in place.

        Of chunks (`step.chunks`) one fused causal attention a sequence is run, or one for all where they are prompts of
        one length. The generation phase reads the first `step.kv_bound` positions of the cache and masks those beyond
        each sequence's own. Caches in pages (`step.pages`) are gathered.
        """
        caches, scales = _both(key_cache, value_cache), _both(key_scale, value_scale)
        if caches and scales:
            dtype = caches[0].dtype
            stored = [_stored(new.transpose(0, 1), dtype, s) for new, s in zip((k, v), scales, strict=True)]
            k, v = (x.transpose(0, 1) for x in stored)
        if caches and step.generates:
            return _generation(step, q, k, v, *caches, position_ids, slopes, scales), *caches
        biases = None if slopes is None else step.alibi(position_ids, slopes, k.shape[1], q.dtype)
        outputs, row = [], 0
        for chunks in step.alike:
            count, n, past, end = len(chunks), len(chunks[0].tokens), chunks[0].past, chunks[0].end
            slots, rows = slice(chunks[0].slot, chunks[0].slot + count), slice(row, row + count * n)
            row = rows.stop
            queries, keys, values = (x[rows].unflatten(0, (count, n)).transpose(1, 2) for x in (q, k, v))
            if caches:
                for cache, new in zip(caches, (keys, values), strict=True):
                    step.write(cache, chunks, new)
                if past:
                    keys, values = (step.read(cache, slots, end) for cache in caches)
            if scales:
                keys, values = (_loaded(x, q.dtype, s) for x, s in zip((keys, values), scales, strict=True))
            mask = None if biases is None else biases[:, :, past - step.first : end - step.first, :end]
            if past and mask is None:
                mask = step.causal(chunks[0], q.device)
            output = _attend(queries, keys, values, mask, is_causal=mask is None, enable_gqa=True)
            outputs.append(output.transpose(1, 2).flatten(0, 1))
        output = torch.cat(outputs).flatten(1)
        return (output, *caches) if caches else output

    def to_tensorrt(
        self,
        lowering: Lowering,
        q: Lowered,
        k: Lowered,
        v: Lowered,
        position_ids: Lowered,
        query_starts: Lowered,
        past_lengths: Lowered,
        key_cache: Lowered,
        value_cache: Lowered,
        slopes: Lowered | None = None,
        key_scale: Lowered | None = None,
        value_scale: Lowered | None = None,
    ) -> tuple[Lowered, ...]:
        """Padded attention with fused layers: append to the cache, attend, unpad; q, k and v are padded already.

        TensorRT-RTX refuses packed attention. Causality and the ragged batch are one mask made from the positions,
        boolean or ALiBi's biases, so nothing rests on how `key_value_lengths` shifts the built-in causal masks. It also
        refuses to update 8-bit caches: in their place it returns what this step adds to them, `[batch, kv_heads,
        query_len, head_dim]`, to be written at `past_lengths`.
        """
        caches, scales = (key_cache, value_cache), _both(key_scale, value_scale)
        if scales:
            presents = [lowering.quantize(x, s, like=key_cache, axis=1) for x, s in zip((k, v), scales, strict=True)]
            read = [
                lowering.extend_cache(cache, rows, scale, past_lengths, like=q)
                for cache, rows, scale in zip(caches, presents, scales, strict=True)
            ]
        else:
            presents = [lowering.update_cache(cache, x, past_lengths) for cache, x in zip(caches, (k, v), strict=True)]
            read = presents
        keys, values = read
        heads, head_dim = q.shape[1], q.shape[3]
        output = lowering.attend(lowering.scale(q, head_dim**-0.5), keys, values, position_ids, slopes)
        return lowering.merge_heads(output, heads * head_dim), *presents


def _both(a: T | None, b: T | None) -> tuple[T, T] | None:
    """Of keys and values; they are there together or not at all."""
    return None if a is None or b is None else (a, b)


def _generation(
    step: Step,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    position_ids: torch.Tensor,
    slopes: torch.Tensor | None,
    scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> torch.Tensor:
    """One new token a sequence: `[batch, heads * head_dim]`."""
    pages, offsets = step.entries(position_ids, key_cache.shape[2])
    key_cache[pages, :, offsets] = k
    value_cache[pages, :, offsets] = v
    _, kv_heads, _, head_dim = key_cache.shape
    grouped = q.unflatten(1, (kv_heads, -1))  # the heads of a group are the queries of its KV head
    mask = step.mask(position_ids, q.dtype) if slopes is None else step.alibi(position_ids, slopes, kv_heads, q.dtype)
    outputs = []
    for rows, end in step.blocks(position_ids, kv_heads * head_dim):
        keys, values = (step.read(cache, rows, end) for cache in (key_cache, value_cache))
        if scales:
            keys, values = (_loaded(x, q.dtype, s) for x, s in zip((keys, values), scales, strict=True))
        # On a CPU a block of one sequence ends with it; on CUDA all have one bound, known to the host.
        exact = slopes is None and not q.is_cuda and rows.stop - rows.start == 1
        own = None if mask is None or exact else mask[rows, ..., :end]
        outputs.append(_attend(grouped[rows], keys, values, own))
    return torch.cat(outputs).flatten(1)


def _stored(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """Keys or values `[kv_heads, tokens, head_dim]` as the cache holds them."""
    return x.to(dtype) if scale is None else quantize(x.float(), scale[:, None, None], dtype)


def _loaded(cache: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None) -> torch.Tensor:
    """What a cache `[..., kv_heads, positions, head_dim]` stands for, in `dtype`."""
    return cache.to(dtype) if scale is None else widened(cache, dtype) * scale.to(dtype)[:, None, None]


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **options: bool
) -> torch.Tensor:
    """Fused attention; in float32 for float16 on a CPU that has no such products, where it is several times slower."""
    if q.dtype == torch.float16 and not q.is_cuda and not multiplies(q.dtype):
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, mask, **options)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position_ids: Tensor,
    query_starts: Tensor,
    past_lengths: Tensor,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    slopes: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """q `[tokens, heads, head_dim]`, k and v `[tokens, kv_heads, head_dim]` to `[tokens, heads * head_dim]` and the new
    caches, where there are any.

    `position_ids` `[tokens]`, `query_starts` `[batch + 1]`, `past_lengths` `[batch]`, all int32; the caches `[batch,
    kv_heads, max_length, head_dim]`, and where they are 8 bits wide the scales of keys and of values, float32
    `[kv_heads]`; ALiBi's `slopes`, float32 `[heads]`.
    """
    return q.network.add(
        Attention(),
        q=q,
        k=k,
        v=v,
        position_ids=position_ids,
        query_starts=query_starts,
        past_lengths=past_lengths,
        key_cache=key_cache,
        value_cache=value_cache,
        slopes=slopes,
        key_scale=key_scale,
        value_scale=value_scale,
    )
