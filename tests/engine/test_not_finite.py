"""Numbers beyond float16: weights are named when an engine is built, layers when it runs; bfloat16 computes them."""

import math

import pytest
import torch
from outlier_models import CONFIG, outlier_weights, write_model
from safetensors.torch import load_file, save_file

from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.evaluation.stages import measure_perplexity
from trtbuild.network.step import Chunk, whole_prompts
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Quantization
from trtbuild.runtime.generation import generate
from trtbuild.runtime.open import open_engine
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import Session

LIMITS = BuildLimits(max_batch_size=2, max_input_len=32, max_output_len=8)
PROMPTS = [[70, 80, 90], [100, 110, 120, 130]]
LAYERS = {"num_hidden_layers": 3}
DOWN = "model.layers.1.mlp.down_proj"


def build(checkpoint, folder, **recipe):
    build_engine_dir(checkpoint, folder, model="m", recipe=recipe, limits=LIMITS, engines=["portable"])
    return folder


@pytest.fixture(scope="module")
def loud(tmp_path_factory):
    """Weights that float16 holds, and activations beyond it from a product of layer 1 on."""
    weights = outlier_weights(CONFIG | LAYERS)
    weights[f"{DOWN}.weight"] *= 5e4
    return write_model(tmp_path_factory.mktemp("loud") / "checkpoint", weights, **LAYERS)


@pytest.fixture(scope="module")
def engine(loud, tmp_path_factory):
    return build(loud, tmp_path_factory.mktemp("loud") / "engine", dtype="float16")


@pytest.mark.parametrize(
    ("name", "value", "dtype", "message"),
    [
        (f"{DOWN}.weight", 1e5, "float16", "holds 100000, and the largest float16 is 65504; use bfloat16"),
        ("model.norm.weight", -7e4, "float16", "holds 70000, and the largest float16 is 65504; use bfloat16"),
        ("model.embed_tokens.weight", 65520, "float16", "holds 65520, and the largest float16 is 65504; use bfloat16"),
        ("lm_head.weight", 3.4e38, "bfloat16", "holds 3.4e+38, and the largest bfloat16 is 3.38953e+38; use float32"),
        (f"{DOWN}.weight", math.nan, "float32", "holds NaN or infinite numbers; they are in the checkpoint, or"),
        (f"{DOWN}.weight", math.inf, "float16", "holds NaN or infinite numbers; they are in the checkpoint, or"),
    ],
)
def test_a_weight_that_does_not_fit_is_named(tmp_path, name, value, dtype, message):
    checkpoint = write_model(tmp_path / "checkpoint")
    weights = load_file(checkpoint / "model.safetensors")
    weights[name].view(-1)[7] = value
    save_file(weights, checkpoint / "model.safetensors")
    with pytest.raises(UserError) as caught:
        build(checkpoint, tmp_path / "engine", dtype=dtype)
    assert str(caught.value).startswith(f"{name} {message}")
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("value", [65504, 65519])  # the second is rounded to the first
def test_the_largest_weight_that_fits(tmp_path, value):
    weights = outlier_weights(CONFIG)
    weights["model.norm.weight"][0] = value
    folder = build(write_model(tmp_path / "checkpoint", weights), tmp_path / "engine", dtype="float16")
    assert load_file(folder / "rank0.safetensors")["model.norm.weight"][0] == 65504


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1e5, "holds 99840, and the largest float16 is 65504; use bfloat16"),
        (1e-9, "is 9.96806e-10, which float16 rounds to 0; use bfloat16"),
    ],
)
def test_scales_of_int4_that_do_not_fit(tmp_path, value, message):
    """Quantized in bfloat16, built in float16."""
    quantization = Quantization.parse({"dtype": "bfloat16", "weights": {"dtype": "int4", "group_size": 32}})
    quantize(write_model(tmp_path / "checkpoint"), tmp_path / "quantized", quantization)
    file = tmp_path / "quantized" / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{DOWN}.weight_scale"][3, 1] = value
    save_file(tensors, file)
    build(tmp_path / "quantized", tmp_path / "bfloat16", dtype="bfloat16")
    with pytest.raises(UserError) as caught:
        build(tmp_path / "quantized", tmp_path / "engine", dtype="float16")
    assert str(caught.value) == f"a scale of {DOWN}.weight {message}"


LAYER = rf"^numbers are not finite in layer 1, from {DOWN} on; float16 ends at 65504, use bfloat16$"


def test_the_layer_is_named(engine, loud):
    opened = open_engine(engine, "portable", "cpu")
    with pytest.raises(UserError, match=LAYER):
        generate(opened.session, PROMPTS, SamplingParams(4))
    dataset = {"name": "trtbuild-news", "split": "evaluation", "samples": 1}
    with pytest.raises(UserError, match=LAYER):
        measure_perplexity(checkpoint_dir=loud, engine_dir=engine, dataset=dataset, device="cpu")
    with pytest.raises(UserError, match=LAYER):  # and again: nothing of the search is left
        opened.session.prefill(PROMPTS, all_logits=True)


def test_the_layer_of_a_quantized_model_is_named(loud, tmp_path):
    """Its products have several constants, and attention has the cache's."""
    quantization = Quantization.parse({"dtype": "float16", "weights": {"dtype": "int4", "group_size": 32}})
    quantize(loud, tmp_path / "quantized", quantization)
    opened = open_engine(build(tmp_path / "quantized", tmp_path / "engine", dtype="float16"), "portable", "cpu")
    with pytest.raises(UserError, match=LAYER):
        opened.session.prefill(PROMPTS, all_logits=True)


def test_keys_that_leave_finite_logits(tmp_path):
    """Scores of minus infinity are weights of 0. Afterwards nothing of them is left in the cache."""
    weights = outlier_weights(CONFIG)
    weights["model.layers.1.self_attn.k_proj.weight"] *= -27200
    session = open_engine(
        build(write_model(tmp_path / "checkpoint", weights), tmp_path / "engine", dtype="float16"), "portable", "cpu"
    ).session
    assert session.step(whole_prompts(PROMPTS)).isfinite().all()
    assert not session.cache.buffers["key_cache.1"].isfinite().all()
    with pytest.raises(UserError, match=r"in layer 1, from model\.layers\.1\.self_attn\.qkv_proj on; float16"):
        generate(session, PROMPTS, SamplingParams(4))
    with pytest.raises(UserError, match="slot 0 holds 0 positions"):
        session.step([Chunk([70], 3, past=3)])
    assert session.prefill(PROMPTS[:1], all_logits=True).isfinite().all()


def test_interpreted_says_what_it_knows(engine):
    pytest.importorskip("tensorrt_rtx")
    with pytest.raises(UserError, match=r"^numbers are not finite in the logits; float16 ends at 65504, use bfloat16"):
        generate(open_engine(engine, "interpreted").session, PROMPTS, SamplingParams(4))


def test_bfloat16_computes_it(loud, tmp_path):
    session = open_engine(build(loud, tmp_path / "engine", dtype="bfloat16"), "portable", "cpu").session
    outputs = generate(session, PROMPTS, SamplingParams(4))
    expected = HuggingFaceModel(loud, device="cpu").logits([*PROMPTS[0], *outputs[0].output_ids])
    ours = session.prefill([[*PROMPTS[0], *outputs[0].output_ids]], all_logits=True)
    assert (ours - expected).norm() < 0.1 * expected.norm()


def test_the_baseline_in_float16(loud):
    model = HuggingFaceModel(loud, "float16", "cpu")
    with pytest.raises(UserError, match=r"prompt [01]: logits of the baseline in float16 are not finite; use bfloat16"):
        model.generate(PROMPTS, SamplingParams(4))
    dataset = {"name": "trtbuild-news", "split": "evaluation", "samples": 1}
    with pytest.raises(UserError, match="logits of window 0 of the text are not finite; where that is float16, use"):
        measure_perplexity(
            checkpoint_dir=loud, dataset=dataset, max_input_len=32, baseline_dtype="float16", device="cpu"
        )


class Overflowing(Session):
    """A session whose logits are finite for the prompts, and NaN from some step on for the second of two."""

    def __init__(self, step: int) -> None:
        self.limits, self.device, self.vocab_size = LIMITS, torch.device("cpu"), 200
        self.lengths, self.prompt_lengths, self.left = [], [], step

    def _step(self, chunks) -> torch.Tensor:
        return torch.eye(2, 200)

    def _decode(self, tokens) -> torch.Tensor:
        self.left -= 1
        return torch.eye(2, 200) * torch.tensor([[1.0], [1.0 if self.left > 0 else math.nan]])

    def check_finite(self, prompts, logits) -> None:
        if not logits.sum().isfinite():
            raise UserError("not finite")


def test_numbers_that_end_to_be_finite_in_generation():
    with pytest.raises(UserError, match="not finite"):
        generate(Overflowing(2), PROMPTS, SamplingParams(4))
    outputs = generate(Overflowing(4), PROMPTS, SamplingParams(4))
    assert [output.output_ids for output in outputs] == [[0] * 4, [1] * 4]
    # What comes after an end is nobody's: token 1 ends the second sequence at once.
    outputs = generate(Overflowing(1), PROMPTS, SamplingParams(4, eos_token_ids=(1,)))
    assert [output.output_ids for output in outputs] == [[0] * 4, [1]]
