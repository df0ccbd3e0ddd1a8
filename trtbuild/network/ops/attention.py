"""Causal self-attention with grouped heads, RoPE and a KV cache: the one operation that knows about sequences."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trtbuild.network.network import Op, Tensor


@dataclass(frozen=True)
class Attention(Op):
    """Attention of packed tokens over each sequence's cache (arXiv 1706.03762; grouped heads 2305.13245).

    Sequence `b` owns the rows `query_starts[b] .. query_starts[b + 1]` of the packed inputs and has
    `past_lengths[b]` positions in its cache, to which this step's keys and values are appended. Query head `h` reads
    KV head `h // (num_heads / num_kv_heads)`; scores are scaled by `head_dim ** -0.5`.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def sizes(self) -> list[int]:
        """Widths of q, k and v in the fused projection."""
        return [n * self.head_dim for n in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]

    def infer(self, qkv, cos, sin, key_cache, value_cache, position_ids, query_starts, past_lengths):
        tokens, width = qkv.shape
        if width != sum(self.sizes) or key_cache.shape != value_cache.shape:
            raise ValueError(f"attention {self} of {qkv} with caches {key_cache}, {value_cache}")
        if key_cache.shape[1::2] != (self.num_kv_heads, self.head_dim):
            raise ValueError(f"attention {self} with cache {key_cache}")
        return [
            (qkv.dtype, (tokens, self.sizes[0])),
            (key_cache.dtype, key_cache.shape),
            (value_cache.dtype, value_cache.shape),
        ]

    def reference(self, qkv, cos, sin, key_cache, value_cache, position_ids, query_starts, past_lengths):
        q, k, v = self._rotated(qkv, cos, sin)
        key_cache, value_cache = key_cache.clone(), value_cache.clone()
        output = torch.empty_like(q)
        group = self.num_heads // self.num_kv_heads
        for b in range(len(past_lengths)):
            rows = slice(int(query_starts[b]), int(query_starts[b + 1]))
            past, total = int(past_lengths[b]), int(past_lengths[b]) + rows.stop - rows.start
            key_cache[b, :, past:total] = k[rows].transpose(0, 1).to(key_cache.dtype)
            value_cache[b, :, past:total] = v[rows].transpose(0, 1).to(value_cache.dtype)
            keys = key_cache[b, :, :total].to(q.dtype).repeat_interleave(group, 0)
            values = value_cache[b, :, :total].to(q.dtype).repeat_interleave(group, 0)
            scores = q[rows].transpose(0, 1) @ keys.transpose(1, 2) * self.head_dim**-0.5
            future = torch.arange(total, device=q.device) > torch.arange(past, total, device=q.device)[:, None]
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            output[rows] = (weights @ values).transpose(0, 1)
        return output.flatten(1), key_cache, value_cache

    def portable(self, step, qkv, cos, sin, key_cache, value_cache, position_ids, query_starts, past_lengths):
        """Equal to `reference`, except that the caches are updated in place.

        The context phase (`step.lengths` known to the host, empty caches) runs one fused causal attention a sequence,
        or one for the batch where all lengths are equal. The generation phase reads the first `step.kv_bound`
        positions of the cache and masks those beyond each sequence's own.
        """
        q, k, v = self._rotated(qkv, cos, sin)
        if step.lengths is None:
            return self._generation(step, q, k, v, key_cache, value_cache, position_ids), key_cache, value_cache
        lengths = step.lengths
        batches = [lengths] if len(set(lengths)) == 1 else [[n] for n in lengths]
        outputs, b, row = [], 0, 0
        for batch in batches:
            count, n = len(batch), batch[0]
            rows = slice(row, row + count * n)
            queries, keys, values = (x[rows].unflatten(0, (count, n)).transpose(1, 2) for x in (q, k, v))
            key_cache[b : b + count, :, :n] = keys
            value_cache[b : b + count, :, :n] = values
            outputs.append(
                _attend(queries, keys, values, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(0, 1)
            )
            b, row = b + count, row + count * n
        return torch.cat(outputs).flatten(1), key_cache, value_cache

    def _generation(self, step, q, k, v, key_cache, value_cache, position_ids):
        sequences, positions = step.slots(position_ids)
        key_cache[sequences, :, positions] = k
        value_cache[sequences, :, positions] = v
        keys, values = key_cache[:, :, : step.kv_bound], value_cache[:, :, : step.kv_bound]
        grouped = q.unflatten(1, (self.num_kv_heads, -1))  # the heads of a group are the queries of its KV head
        return _attend(grouped, keys, values, attn_mask=step.mask(position_ids, q.dtype)).flatten(1)

    def _rotated(self, qkv, cos, sin):
        """q, k, v as `[tokens, heads, head_dim]`, q and k rotated."""
        rotary = self.num_heads + self.num_kv_heads
        heads = qkv.unflatten(1, (-1, self.head_dim))
        qk = heads[:, :rotary]
        first, second = qk.chunk(2, -1)
        qk = torch.addcmul(qk * cos[:, None], torch.cat((second, first), -1), sin[:, None])
        return qk[:, : self.num_heads], qk[:, self.num_heads :], heads[:, rotary:]

    def to_tensorrt(self, lowering, qkv, cos, sin, key_cache, value_cache, position_ids, query_starts, past_lengths):
        """Padded attention with fused layers: pad, rotate, append to the cache, attend, unpad.

        TensorRT-RTX refuses packed attention. Causality and the ragged batch are one boolean mask made from the
        positions, so nothing rests on how `key_value_lengths` shifts the built-in causal masks.
        """
        q, k, v = (
            lowering.heads(lowering.columns(qkv, start, size), self.head_dim)
            for start, size in zip((0, self.sizes[0], sum(self.sizes[:2])), self.sizes, strict=True)
        )
        half = self.head_dim // 2
        cosines, sines = (lowering.padded_columns(x, start, half) for x, start in ((cos, 0), (sin, half)))
        q, k = lowering.rotate(q, cosines, sines), lowering.rotate(k, cosines, sines)
        key_cache = lowering.update_cache(key_cache, k, past_lengths)
        value_cache = lowering.update_cache(value_cache, v, past_lengths)
        output = lowering.attend(lowering.scale(q, self.head_dim**-0.5), key_cache, value_cache, position_ids)
        return lowering.merge_heads(output, self.sizes[0]), key_cache, value_cache


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """Fused attention; in float32 for float16 on a CPU, where torch's own float16 is several times slower."""
    if q.dtype == torch.float16 and not q.is_cuda:
        if (mask := options.get("attn_mask")) is not None:
            options["attn_mask"] = mask.float()
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)


def attention(
    qkv: Tensor,
    rotary: tuple[Tensor, Tensor],
    cache: tuple[Tensor, Tensor],
    position_ids: Tensor,
    query_starts: Tensor,
    past_lengths: Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`[tokens, (heads + 2 kv_heads) * head_dim]` fused q | k | v to `[tokens, heads * head_dim]` and the new caches.

    `rotary`: cos and sin, `[tokens, head_dim]`; `cache`: keys and values, `[batch, kv_heads, max_length, head_dim]`;
    `position_ids` `[tokens]`, `query_starts` `[batch + 1]`, `past_lengths` `[batch]`, all int32.
    """
    op = Attention(num_heads, num_kv_heads, head_dim)
    return qkv.network.add(op, qkv, *rotary, *cache, position_ids, query_starts, past_lengths)
