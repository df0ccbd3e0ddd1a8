"""Attention with linear biases, ALiBi (arXiv 2108.12409): how fast each head forgets."""

import torch


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """What a head's scores lose per position of distance, float32 `[num_heads]`, as in the paper's code.

    `2 ** (-8 (h + 1) / n)` for n a power of two. For another number those of the power of two below it, followed by
    every second one of the slopes for twice that power, which lie between them.
    """

    def geometric(n: int) -> torch.Tensor:
        return 2.0 ** (-8 * torch.arange(1, n + 1, dtype=torch.float64) / n)

    below = 1 << (num_heads.bit_length() - 1)
    return torch.cat((geometric(below), geometric(2 * below)[::2]))[:num_heads].float()
