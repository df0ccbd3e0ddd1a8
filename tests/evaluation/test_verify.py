"""Verification accepts a right engine and finds a disturbed one."""

import math

import pytest
import torch

from trtbuild.errors import UserError
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.evaluation.stages import verify_engine
from trtbuild.evaluation.verify import TOLERANCE, verify
from trtbuild.runtime.open import open_engine


@pytest.fixture(scope="module")
def baseline(tiny_checkpoint):
    return HuggingFaceModel(tiny_checkpoint, device="cpu")


@pytest.fixture
def session(tiny_engine):
    return open_engine(tiny_engine, "portable", "cpu").session


@pytest.fixture
def prompts():
    return [torch.randint(2, 258, (n,)).tolist() for n in (3, 1, 25)]


def slot_of(session, fragment):
    """A constant of the session's engine, as a copy that may be changed."""
    values = session.engine._values
    (slot,) = (i for i, name in enumerate(session.engine.network.tensors) if fragment in name and values[i] is not None)
    values[slot] = values[slot].clone()
    return values[slot]


def test_a_right_engine_agrees(session, baseline, prompts):
    result = verify("x", session, TOLERANCE["float32"], baseline, prompts, 6)
    assert result.agrees
    assert 0 < result.relative_error < 1e-5
    assert result.tokens == 18
    assert result.equal_tokens >= 17
    assert result.worst_gap < 1e-5


def test_relative_error_is_that_of_the_logits(session, baseline, prompts):
    """A head that is 1% too large: every logit is, and no choice changes."""
    slot_of(session, "lm_head").mul_(1.01)
    result = verify("x", session, TOLERANCE["float32"], baseline, prompts, 4)
    assert result.relative_error == pytest.approx(0.01, rel=1e-3)
    assert not result.agrees
    assert result.worst_gap < 1e-5


@pytest.mark.parametrize("fragment", ["layers.0.self_attn.o_proj", "layers.1.mlp.down_proj", "model.norm.weight"])
def test_a_disturbed_weight_differs(session, baseline, prompts, fragment):
    weight = slot_of(session, fragment)
    weight += 0.1 * weight.std().clamp(min=0.02) * torch.randn(weight.shape)
    result = verify("x", session, TOLERANCE["float32"], baseline, prompts, 4)
    assert not result.agrees
    assert result.relative_error > result.tolerance == 2e-4


def test_a_fault_in_generation_alone_differs(session, baseline, prompts):
    """Decoding that loses a position is seen, although the context phase is right."""
    decode = session._decode

    def faulty(tokens):
        session._decode_state["position_ids"].sub_(1)
        logits = decode(tokens)
        session._decode_state["position_ids"].add_(1)
        return logits

    session._decode = faulty
    assert verify("x", session, TOLERANCE["float32"], baseline, prompts, 1).agrees
    assert not verify("x", session, TOLERANCE["float32"], baseline, prompts, 5).agrees


def test_nan_never_agrees(session, baseline, prompts, monkeypatch):
    """Of prompts it is an error that says where it comes from, of generation steps a difference."""
    decode = session.decode
    monkeypatch.setattr(session, "decode", lambda tokens: decode(tokens) * math.nan)
    assert not verify("x", session, TOLERANCE["float32"], baseline, prompts, 2).agrees
    slot_of(session, "model.norm.weight")[0] = math.nan
    with pytest.raises(UserError, match=r"^numbers are not finite from model\.norm on; the checkpoint's weights"):
        verify("x", session, TOLERANCE["float32"], baseline, prompts, 2)


def test_verify_engine(tiny_engine, tiny_checkpoint):
    (result,) = verify_engine(tiny_engine, tiny_checkpoint, ["Hello", "you"], 4, ["portable"])
    assert (result.name, result.agrees, result.tokens) == ("portable engine (float32)", True, 8)


def test_more_prompts_than_a_batch_are_split(tiny_engine, tiny_checkpoint):
    (agreement,) = verify_engine(tiny_engine, tiny_checkpoint, ["a", "bc", "def", "g", "hi", "j"], 4, ["portable"])
    assert agreement.agrees
    assert agreement.tokens == 24


@pytest.mark.parametrize(
    ("texts", "length", "message"),
    [
        (["a" * 33], 4, "prompt 0 has 33 tokens"),
        (["a" * 32], 18, "a sequence has reached max_length 48"),
        (["a"], 0, "max_output_len is 0"),
    ],
)
def test_refused(tiny_engine, tiny_checkpoint, texts, length, message):
    with pytest.raises(UserError, match=message):
        verify_engine(tiny_engine, tiny_checkpoint, texts, length, ["portable"])
