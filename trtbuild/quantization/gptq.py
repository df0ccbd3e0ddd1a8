"""GPTQ (arXiv 2210.17323): rounding column by column, each error made good by the columns that follow."""

import torch

from trtbuild.errors import UserError
from trtbuild.linear.int4 import Int4Grid

BLOCK = 128  # columns whose errors are applied to the rest of the matrix at once


def gptq(
    weight: torch.Tensor, inverse: torch.Tensor, grid: Int4Grid
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rounds `weight` `[out, in]` so that its products change least; `inverse` is `inverse_cholesky` of their inputs.

    Returns values `[out, in]` (-8 .. 7), scales and zeros `[out, groups]`, float32; a group's
    grid is chosen when its first column is reached, from the weights as they are then; columns keep their
    order ("no act-order"). Rows do not depend on each other.
    """
    weight = weight.float().clone()
    out, width = weight.shape
    values = torch.empty_like(weight)
    all_scales = weight.new_empty(out, width // grid.group_size)
    all_zeros = torch.empty_like(all_scales)
    for start in range(0, width, BLOCK):
        stop = min(start + BLOCK, width)
        # Columns are rows here: contiguous, which is what the loop reads and writes.
        block = weight[:, start:stop].T.contiguous()
        errors = torch.empty_like(block)
        upper = inverse[start:stop, start:stop]
        for i in range(stop - start):
            column = start + i
            if column % grid.group_size == 0:
                group = slice(column, column + grid.group_size)
                inside = block[i : i + grid.group_size].T
                rest = weight[:, stop : group.stop]  # of a group that is longer than the block
                scales, zeros = grid.fit(torch.cat((inside, rest), 1))
                all_scales[:, column // grid.group_size], all_zeros[:, column // grid.group_size] = scales, zeros
            level = grid.levels(block[i], scales, zeros)
            values[:, column] = level
            errors[i] = (block[i] - (level - zeros) * scales) / upper[i, i]
            block[i + 1 :].addr_(upper[i, i + 1 :], errors[i], alpha=-1)
        weight[:, stop:].addmm_(errors.T, inverse[start:stop, stop:], alpha=-1)
    return values, all_scales, all_zeros


def inverse_cholesky(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of `gram` `[in, in]`, a sum of `x x^T` over inputs `x`.

    The diagonal is damped by a share of its mean, more where that is not enough. Channels that are never active get the
    mean, which leaves them to plain rounding. Raises `UserError` where no damping helps.
    """
    hessian = gram.clone()
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal[diagonal == 0] = torch.where(mean > 0, mean, torch.ones_like(mean))
    for attempt in range(4):
        damped = hessian.clone()
        damped.diagonal().add_(damping * 10**attempt * diagonal.mean())
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return upper
    raise UserError("the calibration activations are too alike for GPTQ (their Gram matrix is singular); use more text")
