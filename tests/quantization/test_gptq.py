"""GPTQ against the paper's algorithm written out, and against rounding to nearest."""

import pytest
import torch

from trtbuild.errors import UserError
from trtbuild.linear.int4 import Int4Grid
from trtbuild.quantization.gptq import BLOCK, gptq, inverse_cholesky

# Input channels and group size: groups within a block of columns, over several blocks, and one a row.
SIZES = [(96, 32), (320, 64), (256, 128), (512, 256), (320, 320), (64, 64)]
sizes = pytest.mark.parametrize(("width", "group_size"), SIZES)
symmetries = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


def case(width: int, out: int = 48) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Gram matrix of correlated inputs in which some channels are larger."""
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=generator) * width**-0.5
    inputs = torch.randn(4 * width, width, generator=generator) @ (mixing + 0.5 * torch.eye(width))
    inputs[:, ::17] *= 6
    return torch.randn(out, width, generator=generator) * width**-0.5, inputs.T @ inputs


def output_error(weight: torch.Tensor, rounded: torch.Tensor, gram: torch.Tensor) -> float:
    """`trace(d gram d^T)`: the squared error of the outputs."""
    difference = (weight - rounded).double()
    return (difference @ gram.double() * difference).sum().item()


def damped(gram: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    hessian = gram.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = gram.double().diagonal().mean()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    return hessian


def literal(weight: torch.Tensor, gram: torch.Tensor, grid: Int4Grid):
    """Equations 2 and 3 of the paper in float64: after each column, the rest of the row makes its error good, and the
    column is eliminated from the inverse of the Hessian."""
    weight, inverse = weight.double().clone(), torch.linalg.inv(damped(gram))
    values = torch.empty_like(weight)
    fitted = []
    for column in range(weight.shape[1]):
        if column % grid.group_size == 0:
            fitted.append(grid.fit(weight[:, column : column + grid.group_size].float()))
        scales, zeros = (x.double() for x in fitted[-1])
        values[:, column] = grid.levels(weight[:, column], scales, zeros)
        error = (weight[:, column] - (values[:, column] - zeros) * scales) / inverse[column, column]
        weight[:, column:] -= error[:, None] * inverse[column, column:]
        rest = inverse[column:, column:]
        rest -= torch.outer(rest[:, 0], rest[0]) / rest[0, 0]
    scales, zeros = (torch.stack(x, 1) for x in zip(*fitted, strict=True))
    return values.float(), scales, zeros


@sizes
@symmetries
def test_equals_the_papers_algorithm(width, group_size, symmetric):
    """A number that lies within 1e-6 of the middle between two levels may go either way, and moves the rest of its
    row: hence not every value, but rows in which all are equal."""
    weight, gram = case(width)
    grid = Int4Grid(group_size, symmetric, torch.float32)
    values, scales, zeros = gptq(weight, inverse_cholesky(gram), grid)
    expected, expected_scales, expected_zeros = literal(weight, gram, grid)
    equal = (values == expected).all(1) & (zeros == expected_zeros).all(1)
    assert equal.float().mean() > 0.9
    torch.testing.assert_close(scales[equal], expected_scales[equal], rtol=1e-4, atol=0)
    ours = output_error(weight, Int4Grid.dequantize(values, scales, zeros), gram)
    theirs = output_error(weight, Int4Grid.dequantize(expected, expected_scales, expected_zeros), gram)
    assert ours == pytest.approx(theirs, rel=2e-2)


@sizes
@symmetries
def test_errs_less_than_rounding_to_nearest(width, group_size, symmetric):
    """With 48 rows, at most 0.7 of it; integers, and scales that are exact in the recipe's dtype."""
    weight, gram = case(width)
    grid = Int4Grid(group_size, symmetric, torch.float16)
    values, scales, zeros = gptq(weight, inverse_cholesky(gram), grid)
    nearest = Int4Grid.dequantize(*grid.round(weight))
    ours = output_error(weight, Int4Grid.dequantize(values, scales, zeros), gram)
    assert ours < 0.7 * output_error(weight, nearest, gram)
    assert values.shape == weight.shape
    assert scales.shape == zeros.shape == (48, width // group_size)
    assert values.equal(values.round())
    assert values.min() >= -8
    assert values.max() <= 7
    assert scales.equal(scales.half().float())
    assert (zeros == 0).all() == symmetric


def test_rows_do_not_depend_on_each_other():
    weight, gram = case(192)
    grid, inverse = Int4Grid(64, False, torch.float16), inverse_cholesky(gram)
    together = gptq(weight, inverse, grid)
    for rows in (slice(0, 1), slice(5, 30)):
        for part, whole in zip(gptq(weight[rows], inverse, grid), together, strict=True):
            assert (part == whole[rows]).float().mean() > 0.99


def test_the_weight_is_left_alone():
    weight, gram = case(192)
    before = weight.clone()
    gptq(weight, inverse_cholesky(gram), Int4Grid(64, True, torch.float16))
    assert weight.equal(before)


def test_uncorrelated_inputs_are_rounded_to_nearest():
    """Then no other column can make an error good, however large the channels are."""
    weight, _ = case(BLOCK + 64)
    grid = Int4Grid(64, False, torch.float16)
    gram = torch.diag(torch.rand(BLOCK + 64) * 100 + 1)
    for ours, expected in zip(gptq(weight, inverse_cholesky(gram), grid), grid.round(weight), strict=True):
        assert ours.equal(expected)


# Gram matrices


def test_inverse_cholesky():
    """Upper triangular `U` with `U^T U` the inverse of the damped matrix."""
    _, gram = case(96)
    upper = inverse_cholesky(gram)
    assert upper.equal(upper.triu())
    product = (upper.T @ upper).double() @ damped(gram)
    assert (product - torch.eye(96)).abs().max() < 1e-3


@symmetries
def test_dead_channels_are_rounded_to_nearest(symmetric):
    """Nothing is known of their inputs; the others' errors do not reach them."""
    weight, gram = case(192)
    dead = torch.tensor([0, 5, 100, 191])
    gram[dead], gram[:, dead] = 0, 0
    grid = Int4Grid(64, symmetric, torch.float16)
    values, scales, zeros = gptq(weight, inverse_cholesky(gram), grid)
    wide = [x.repeat_interleave(64, 1)[:, dead] for x in (scales, zeros)]
    assert values[:, dead].equal(grid.levels(weight[:, dead], *wide))
    expected, _, _ = literal(weight, gram, grid)
    assert (values == expected).all(1).float().mean() > 0.9


def test_no_channel_was_active():
    weight, _ = case(64)
    grid = Int4Grid(64, True, torch.float16)
    values, scales, _ = gptq(weight, inverse_cholesky(torch.zeros(64, 64)), grid)
    assert values.equal(grid.round(weight)[0])
    assert scales.isfinite().all()


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_fewer_tokens_than_channels(rank):
    """A singular matrix, which damping makes regular; still better than rounding to nearest."""
    weight, _ = case(256)
    inputs = torch.randn(rank, 256, generator=torch.Generator().manual_seed(0))
    gram, grid = inputs.T @ inputs, Int4Grid(64, True, torch.float16)
    rounded = Int4Grid.dequantize(*gptq(weight, inverse_cholesky(gram), grid))
    nearest = Int4Grid.dequantize(*grid.round(weight))
    assert output_error(weight, rounded, gram) < 0.5 * output_error(weight, nearest, gram)


def test_a_matrix_that_damping_does_not_help():
    with pytest.raises(UserError, match=r"Gram matrix is singular.*use more text"):
        inverse_cholesky(torch.tensor([[1.0, 100.0], [100.0, 1.0]]))
