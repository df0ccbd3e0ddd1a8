"""ALiBi's slopes, against those that the paper states and its rule for other numbers of heads."""

import pytest
import torch

from trtbuild.models.alibi import alibi_slopes


def test_published_slopes():
    assert alibi_slopes(8).tolist() == [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]
    sixteen = [2 ** (-(i + 1) / 2) for i in range(16)]
    assert alibi_slopes(16).tolist() == pytest.approx(sixteen, rel=1e-7)
    assert alibi_slopes(1).tolist() == [2**-8]


@pytest.mark.parametrize(("heads", "below"), [(3, 2), (5, 4), (6, 4), (7, 4), (12, 8), (40, 32), (63, 32)])
def test_slopes_of_other_numbers_of_heads(heads, below):
    """The power of two below, then the 1st, 3rd, 5th... of twice as many, which lie between those."""
    slopes = alibi_slopes(heads)
    assert (slopes.dtype, slopes.shape) == (torch.float32, (heads,))
    assert torch.equal(slopes[:below], alibi_slopes(below))
    more = [2 ** (-8 * (2 * i + 1) / (2 * below)) for i in range(heads - below)]
    assert slopes[below:].tolist() == pytest.approx(more, rel=1e-7)
    assert len(set(slopes.tolist())) == heads
