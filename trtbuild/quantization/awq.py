"""AWQ (arXiv 2306.00978): scaling salient input channels up before rounding, then clipping the groups' ranges.

The paper's objective, the squared error of a product over the calibration activations, needs of them only their Gram
matrix: for an error `d` of the weights it is `trace(d gram d^T)`.
"""

from collections.abc import Callable

import torch

from trtbuild.linear.int4 import Int4Grid
from trtbuild.quantization.layer import LayerWeights

SCALE_STEPS = 20
CLIP_STEPS = 10  # of 5%: down to half the range


def search_scales(
    layer: LayerWeights,
    product: str,
    gram: torch.Tensor,
    activation_mean: torch.Tensor,
    grid: Int4Grid,
    map_: Callable = map,
) -> torch.Tensor:
    """The factors `s` for which rounding `weight * s` and dividing by `s` errs least, as `layer.smooth` wants them.

    `gram` `[in, in]` and `activation_mean` `[in]` (of magnitudes) are those of the product's input. Candidates, as in
    the authors' code: `activation_mean^r / weight_mean^(1 - r)`, the weights' means being of magnitudes relative to
    their group's largest; and no scaling.
    """
    weight = layer.weights[product]
    groups = weight.abs().unflatten(1, (-1, grid.group_size))
    relative = (groups / groups.amax(-1, keepdim=True).clamp_min(1e-12)).flatten(1).mean(0)
    magnitude = layer.reduce(product, relative, torch.mean)
    active = layer.reduce(product, activation_mean, torch.mean)

    def candidate(step: int) -> torch.Tensor:
        if step == 0:
            return torch.ones_like(active)
        ratio = step / SCALE_STEPS
        scales = (active**ratio / (magnitude ** (1 - ratio) + 1e-4)).clamp_min(1e-4)
        return scales / (scales.amax() * scales.amin()).sqrt()

    def error(step: int) -> torch.Tensor:
        scales = layer.expand(product, candidate(step))
        return output_error(weight - grid.dequantize(*grid.round(weight * scales)) / scales, gram)

    errors = torch.stack(list(map_(error, range(SCALE_STEPS))))
    return candidate(int(errors.argmin()))


def output_error(difference: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """`trace(difference gram difference^T)`, the squared error that a change of weights makes in the outputs."""
    return ((difference @ gram) * difference).sum()


def clip(weight: torch.Tensor, gram: torch.Tensor, grid: Int4Grid) -> torch.Tensor:
    """`weight` with each group clamped to the share of its range, 1 to 0.5, whose rounding errs least in that group."""
    groups = weight.unflatten(1, (-1, grid.group_size))  # [out, groups, group_size]
    blocks = gram.unflatten(0, (-1, grid.group_size)).unflatten(2, (-1, grid.group_size))
    blocks = blocks.diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, group_size, group_size]
    absmax = groups.abs().amax(-1, keepdim=True)
    best, best_error = groups, None
    for step in range(CLIP_STEPS + 1):
        limit = absmax * (1 - 0.5 * step / CLIP_STEPS)
        clipped = groups.clamp(-limit, limit)
        rounded = grid.dequantize(*grid.round(clipped.flatten(1))).view_as(groups)
        difference = (groups - rounded).transpose(0, 1)  # [groups, out, group_size]
        error = ((difference @ blocks) * difference).sum(-1).T
        if best_error is None:
            best, best_error = clipped, error
            continue
        better = error < best_error
        best = torch.where(better[..., None], clipped, best)
        best_error = torch.where(better, error, best_error)
    return best.flatten(1)
