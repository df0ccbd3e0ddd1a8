"""Verification accepts a right engine and finds a disturbed one."""

import math

import pytest
import torch
from numerics import change_constant

from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.evaluation import stages
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.evaluation.stages import verify_engine
from trtbuild.evaluation.verify import TOLERANCE, Agreement, verify
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


def test_a_right_engine_agrees(session, baseline, prompts):
    result = verify("x", session, TOLERANCE["float32"], baseline, prompts, 6)
    assert result.agrees
    assert 0 < result.relative_error < 1e-5
    assert result.tokens == 18
    assert result.equal_tokens >= 17
    assert result.worst_gap < 1e-5


def test_relative_error_is_that_of_the_logits(session, baseline, prompts):
    """A head that is 1% too large: every logit is, and no choice changes."""
    change_constant(session, "lm_head.weight", lambda x: 1.01 * x)
    result = verify("x", session, TOLERANCE["float32"], baseline, prompts, 4)
    assert result.relative_error == pytest.approx(0.01, rel=1e-3)
    assert not result.agrees
    assert result.worst_gap < 1e-5


@pytest.mark.parametrize(
    ("dtype", "too_large"), [("float32", 3e-4), ("float16", 8e-3), ("bfloat16", 0.1)], ids=["32", "16", "b16"]
)
def test_how_far_each_dtype_may_be_off(tiny_checkpoint, tmp_path, monkeypatch, dtype, too_large):
    """A right engine in each dtype agrees; not one whose logits are all too large by a little more than it may err."""
    limits, texts = BuildLimits(2, 16, 8), ["Hello", "you"]
    recipe = {"dtype": dtype}
    build_engine_dir(tiny_checkpoint, tmp_path / "e", model="tiny", recipe=recipe, limits=limits, engines=["portable"])
    (right,) = verify_engine(tmp_path / "e", tiny_checkpoint, texts, 4, ["portable"])
    assert right.agrees

    def opened(*arguments):
        engine = open_engine(*arguments)
        change_constant(engine.session, "lm_head.weight", lambda x: (1 + too_large) * x)
        return engine

    monkeypatch.setattr(stages, "open_engine", opened)
    (wrong,) = verify_engine(tmp_path / "e", tiny_checkpoint, texts, 4, ["portable"])
    assert right.tolerance == wrong.tolerance == {"float32": 2e-4, "float16": 5e-3, "bfloat16": 7.5e-2}[dtype]
    assert wrong.relative_error == pytest.approx(too_large, rel=0.3)
    assert not wrong.agrees


@torch.inference_mode()
def test_a_choice_may_be_off_by_two_logits_errors(session, baseline, prompts):
    """Either of two logits may be wrong by the tolerance, a share of the largest one."""
    result = verify("x", session, 0.01, baseline, prompts, 1)
    largest = max(baseline.logits(prompt).abs().max().item() for prompt in prompts)
    assert result.allowed_gap == pytest.approx(2 * 0.01 * largest)


def test_what_rounding_changes_is_allowed_one_and_a_half_times(session, baseline, prompts):
    """A baseline whose rounding makes logits 2% smaller."""

    class Rounding:
        name, rounds = "rounding", True

        def logits(self, ids, rounded=True, prompt_len=None):
            return baseline.logits(ids, prompt_len=prompt_len) * (1 if rounded else 1.02)

    assert verify("x", session, 2e-4, Rounding(), prompts, 2).tolerance == pytest.approx(0.03)
    assert verify("x", session, 0.05, Rounding(), prompts, 2).tolerance == 0.05


@pytest.mark.parametrize(
    ("error", "gap", "agrees"), [(1e-2, 3e-2, True), (1.01e-2, 0, False), (0, 3.03e-2, False), (math.nan, 0, False)]
)
def test_agreement(error, gap, agrees):
    result = Agreement("x", "y", error, tolerance=1e-2, tokens=8, equal_tokens=8, worst_gap=gap, allowed_gap=3e-2)
    assert result.agrees is agrees


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj", "model.layers.1.mlp.down_proj", "model.norm"])
def test_a_disturbed_weight_differs(session, baseline, prompts, name):
    change_constant(session, f"{name}.weight", lambda x: x + 0.1 * x.std().clamp(min=0.02) * torch.randn(x.shape))
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
    change_constant(session, "model.norm.weight", lambda x: x.index_fill(0, torch.tensor(0), math.nan))
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
