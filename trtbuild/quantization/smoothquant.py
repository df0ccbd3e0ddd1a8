"""SmoothQuant (arXiv 2211.10438): moving the activations' outliers into the weights."""

import torch


def smoothing_scales(activation_absmax: torch.Tensor, weight_absmax: torch.Tensor, alpha: float) -> torch.Tensor:
    """`s = activation_absmax^alpha / weight_absmax^(1 - alpha)`, `[in]` float32: activations / s, weights * s.

    Channels in which either is zero are left alone.
    """
    active = (activation_absmax > 0) & (weight_absmax > 0)
    scales = activation_absmax.float() ** alpha / weight_absmax.float() ** (1 - alpha)
    return torch.where(active, scales, torch.ones_like(scales)).clamp_(1e-5, 1e5)
