"""Dense caches laid out in pages, at random places among poisoned ones."""

from collections.abc import Sequence

import torch


def in_pages(
    caches: Sequence[torch.Tensor], lengths: Sequence[int], held: Sequence[int], page_size: int, shared: int = 0
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Pools, and a table for sequences of `lengths` positions, of which each has `held` and the rest is poison.

    The first `shared` pages of all sequences are the first one's. Page 0, which entries that are not given name, a page
    that nobody has, and what lies beyond `held` are NaN; of integers, which have none, 99.
    """
    counts = [-(-n // page_size) for n in lengths]
    width, (_, kv_heads, _, head_dim) = max(counts) + 1, caches[0].shape
    places = (torch.randperm(sum(counts) + 1) + 1).int().split([*counts, 1])
    table = torch.zeros(len(lengths), width, dtype=torch.int32, device=caches[0].device)
    pools = []
    for cache in caches:
        integers = cache.dtype == torch.int8
        pool = torch.full((sum(counts) + 2, kv_heads, page_size, head_dim), 99 if integers else float("nan"))
        pool = pool.to(cache.device, cache.dtype)
        for b, own in enumerate(places[:-1]):
            table[b, : len(own)] = own
            table[b, :shared] = places[0][:shared]
            for j, page in enumerate(table[b, : len(own)].tolist()):
                first, end = j * page_size, min((j + 1) * page_size, held[b])
                if first < end:
                    pool[page, :, : end - first] = cache[b, :, first:end]
        pools.append(pool)
    return pools, table


def from_pages(pool: torch.Tensor, table: torch.Tensor, b: int, length: int) -> torch.Tensor:
    """A sequence's cache, `[kv_heads, length, head_dim]`."""
    return pool[table[b].long()].transpose(0, 1).flatten(1, 2)[:, :length]
