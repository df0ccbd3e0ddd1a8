"""Which part of the model a rank holds: every part is held, and by as many ranks as it should be."""

from collections import Counter

import pytest

from trtbuild.decoder.mapping import Mapping
from trtbuild.errors import UserError

sizes = pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (3, 4)])


def world(tp_size: int, pp_size: int) -> list[Mapping]:
    return [Mapping(tp_size, pp_size, rank) for rank in range(tp_size * pp_size)]


@sizes
def test_coordinates(tp_size, pp_size):
    ranks = world(tp_size, pp_size)
    assert [(m.pp_rank, m.tp_rank) for m in ranks] == [(i, j) for i in range(pp_size) for j in range(tp_size)]
    for m in ranks:
        assert m.rank == m.pp_rank * tp_size + m.tp_rank
        assert [*m.stage] == [other.rank for other in ranks if other.pp_rank == m.pp_rank]
        assert (m.is_first, m.is_last) == (m.rank < tp_size, m.rank >= len(ranks) - tp_size)


@sizes
@pytest.mark.parametrize("count", [4, 5, 32, 61])
def test_layers(tp_size, pp_size, count):
    """Each is every rank's of one stage, in order, and stages differ by one layer at most."""
    ranks = world(tp_size, pp_size)
    assert [i for m in ranks[::tp_size] for i in m.layers(count)] == [*range(count)]
    assert all(m.layers(count) == ranks[m.stage.start].layers(count) for m in ranks)
    assert max(len(m.layers(count)) for m in ranks) - min(len(m.layers(count)) for m in ranks) <= 1


@sizes
@pytest.mark.parametrize("vocab_size", [320, 321, 24])
def test_words(tp_size, pp_size, vocab_size):
    """Each is one rank's of a stage, or every rank's where they cannot have as many each."""
    ranks = world(tp_size, pp_size)[:tp_size]
    times = 1 if vocab_size % tp_size == 0 else tp_size
    assert Counter(word for m in ranks for word in m.words(vocab_size)) == dict.fromkeys(range(vocab_size), times)
    assert len({len(m.words(vocab_size)) for m in ranks}) == 1


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ((2, 2, 4), "rank 4 is outside a world of 4"),
        ((2, 1, -1), "rank -1 is outside a world of 2"),
        ((0, 2, 0), "tp_size 0 x pp_size 2: both must be at least 1"),
        ((-1, -1, 0), "tp_size -1 x pp_size -1: both must be at least 1"),
    ],
)
def test_what_there_is_not(mapping, message):
    with pytest.raises(UserError) as caught:
        Mapping(*mapping)
    assert str(caught.value) == message
