"""A step's last piece, interpreted, against the same in plain torch."""

import pytest
import torch

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels import sample
from trtbuild.runtime.sampling import draw

AHEAD = 4


def state(logits, drawn, marked, step):
    batch, vocab = logits.shape
    places = torch.randint(1000, (batch,), dtype=torch.int32)
    return {
        "tokens": torch.full((batch,), -7, dtype=torch.int32),
        "places": places,
        "ring": torch.full((AHEAD, batch), -9, dtype=torch.int32),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (batch,)) if drawn else None,
        "seen": torch.randint(4, (batch, vocab), dtype=torch.int32) if marked else None,
        "position_ids": places - 1 if step else None,
        "sequence_lengths": places.clone() if step else None,
    }


def same(actual, expected):
    return all(x is y is None or x.equal(y) for x, y in zip(actual.values(), expected.values(), strict=True))


@pytest.mark.parametrize(("batch", "vocab"), [(1, 1), (3, 300), (2, 1024), (2, 1025), (1, 5000)])
@pytest.mark.parametrize(("drawn", "marked", "step"), [(False, False, True), (True, True, False), (True, False, True)])
def test_equals_torch(batch, vocab, drawn, marked, step):
    """Several steps in a row: what programs met in is as it was."""
    scratch = sample.new_scratch(batch, torch.device("cpu"))
    actual = state(torch.empty(batch, vocab), drawn, marked, step)
    expected = {name: None if x is None else x.clone() for name, x in actual.items()}
    for _ in range(AHEAD + 1):
        logits = 3 * torch.randn(batch, vocab)
        sample.draw(logits, *actual.values(), scratch=scratch)
        draw(logits, *expected.values())
        assert same(actual, expected)


@pytest.mark.parametrize(
    "row",
    [
        [1.0, 5.0, 5.0, 2.0],
        [-5.0, -1.0, -1.0, -3.0],
        [-0.0, 0.0, -1.0, 0.0],
        [float("-inf")] * 4,
        [float("-inf"), float("-inf"), -3e38, float("-inf")],
        [1.0, float("inf"), 2.0, float("inf")],
        [1.0, float("nan"), float("inf"), float("nan")],
    ],
    ids=str,
)
def test_the_first_of_equals_and_what_is_not_finite(row, monkeypatch):
    monkeypatch.setattr(sample, "BLOCK", 2)
    logits = torch.tensor([row, row])
    actual = state(logits, False, False, False)
    sample.draw(logits, *actual.values(), scratch=sample.new_scratch(2, logits.device))
    assert actual["tokens"].tolist() == logits.argmax(-1).tolist()
