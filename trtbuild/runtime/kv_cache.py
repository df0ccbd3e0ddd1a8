"""The KV cache's memory."""

from copy import copy

import torch

from trtbuild.network import Network


class KVCache:
    """One buffer for each of a network's states, `[max_batch, kv_heads, max_length, head_dim]`; where sequences are in
    pages, `[pages, kv_heads, page_size, head_dim]`.

    Zeroed once: attention multiplies what lies beyond a sequence's end by zero, which only works for finite numbers.
    """

    def __init__(self, network: Network, count: int, device: torch.device, length: int = 0) -> None:
        self.buffers = {}
        for name in network.states:
            tensor = network.tensors[name]
            shape = count, tensor.size(1), length or tensor.size(2), tensor.size(3)
            self.buffers[name] = torch.zeros(shape, dtype=tensor.dtype, device=device)
        self._keys = [node.inputs["key_cache"] for node in network.nodes if "key_cache" in node.inputs]

    def views(self, batch_size: int, first: int = 0) -> dict[str, torch.Tensor]:
        """The caches of `batch_size` sequences from slot `first` on, by input name."""
        return {name: buffer[first : first + batch_size] for name, buffer in self.buffers.items()}

    def part(self, slots: range) -> "KVCache":
        """The cache of some of its slots, in the same memory."""
        part = copy(self)
        part.buffers = self.views(len(slots), slots.start)
        return part

    def copy_slots(self, sources: torch.Tensor, first: int, end: int) -> None:
        """Slot i becomes what slot `sources[i]` is, an integer tensor's, at the positions from `first` to `end`."""
        for buffer in self.buffers.values():
            held = buffer.view(torch.int8) if buffer.dtype.itemsize == 1 else buffer  # torch does not index all of FP8
            held = held[:, :, first:end]
            held[: len(sources)] = held[sources]

    def forget(self) -> None:
        """Gives up its memory, and remembers the sizes."""
        self.buffers = {name: buffer.to("meta") for name, buffer in self.buffers.items()}

    def move_into(self, other: "KVCache") -> None:
        """Has its place in the memory of another, at least as large; of the two one is in use at a time."""
        for name, buffer in self.buffers.items():
            self.buffers[name] = other.buffers[name].view(-1)[: buffer.numel()].view(buffer.shape)

    def sum_of_keys(self, batch_size: int, length: int) -> torch.Tensor:
        """Float32 sum of the first `length` keys in float16, of which any that is not finite makes it so.

        Logits need not tell: a score of minus infinity is a weight of 0.
        """
        total = torch.zeros((), device=next(iter(self.buffers.values())).device)
        for name in self._keys:
            if self.buffers[name].dtype == torch.float16:
                total += self.buffers[name][:batch_size, :, :length].sum(dtype=torch.float32)
        return total

    @torch.inference_mode()
    def clear(self) -> None:
        """Zeroes it again."""
        for buffer in self.buffers.values():
            buffer.zero_()
