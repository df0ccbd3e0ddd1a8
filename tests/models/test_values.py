"""Values of other kinds in a configuration: taken as what they mean, written so, or refused with one line."""

import json
import shutil

import pytest
import torch
from published_models import LLAMA, QWEN, llama_tensors, write_published

from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.evaluation.baseline import PortableBaseline
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.models.families import canonical_config, config_from_hugging_face
from trtbuild.models.values import coerced

IDS = list(range(5, 45))
SCALING = {"rope_type": None, "type": "dynamic", "factor": 2}
MEANT = [
    ({"rope_theta": "1e6"}, {"rope_theta": 1e6}),
    ({"rope_theta": None}, {}),
    ({"rms_norm_eps": "1e-5"}, {"rms_norm_eps": 1e-5}),
    ({"hidden_size": "48"}, {"hidden_size": 48}),
    ({"max_position_embeddings": 512.0}, {"max_position_embeddings": 512}),
    ({"vocab_size": "3.2e2"}, {"vocab_size": 320}),
    ({"head_dim": None, "rope_scaling": None}, {"rope_scaling": None}),
    ({"tie_word_embeddings": None}, {}),
    ({"rope_scaling": {"type": None}}, {"rope_scaling": {}}),
    ({"rope_scaling": {"type": "linear", "factor": "4.0"}}, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ({"rope_scaling": SCALING}, {"rope_scaling": {"type": "dynamic", "factor": 2}}),
    ({"rope_parameters": {"rope_theta": "1e6"}}, {"rope_parameters": {"rope_theta": 1e6}}),
]


@pytest.mark.parametrize(("given", "meant"), MEANT, ids=str)
def test_what_is_meant(given, meant):
    rest = {key: value for key, value in LLAMA.items() if key not in given}
    config = coerced(rest | given, "x")
    assert config == rest | meant
    assert {key: type(value) for key, value in config.items()} == {
        key: type(value) for key, value in (rest | meant).items()
    }
    assert coerced(config, "x") == config


@pytest.mark.parametrize(("given", "meant"), MEANT, ids=str)
def test_what_is_meant_is_written(tmp_path, given, meant):
    """A linked folder's weights stay linked. transformers computes the same from what we wrote, and does not die."""
    folder = write_published(tmp_path / "x", LLAMA | given, llama_tensors(LLAMA), shards=1, safetensors=True)
    make_checkpoint({"local": {"path": str(folder)}}, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == canonical_config(LLAMA | given, "x")
    assert not (tmp_path / "out" / "config.json").is_symlink()
    assert (tmp_path / "out" / "model.safetensors").is_symlink()
    expected = HuggingFaceModel(tmp_path / "out", device="cpu").logits(IDS)
    for place in ("out", "x"):
        ours = PortableBaseline(tmp_path / place, "float32", "cpu", None, BuildLimits(1, 64, 1), "").logits(IDS)
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)


def test_other_families():
    text = {"seq_length": "512", "rotary_emb_base": "1e4", "intermediate_size": 160.0, "layer_norm_epsilon": "1e-6"}
    assert config_from_hugging_face(QWEN | text, "x") == config_from_hugging_face(QWEN, "x")


def test_dummy_weights(tmp_path):
    make_checkpoint({"dummy": {"config": LLAMA | {"rope_theta": "1e6"}}}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_theta"] == 1e6


SIZE = "an integer from 1 to 16777216 is expected"
NUMBER = "a number above 0 is expected"
EPSILON = "a number above 0 and at most 0.1 is expected, such as 1.0e-6"
BOOLEAN = "true or false is expected"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", 0, SIZE),
        ("hidden_size", -48, SIZE),
        ("hidden_size", 48.5, SIZE),
        ("hidden_size", True, SIZE),
        ("vocab_size", "many", SIZE),
        ("vocab_size", [320], SIZE),
        ("vocab_size", 2**31, SIZE),
        ("vocab_size", 10**400, SIZE),
        ("num_key_value_heads", 0, SIZE),
        ("head_dim", 0, SIZE),
        ("num_hidden_layers", 2**31, "an integer from 1 to 1024 is expected"),
        ("rms_norm_eps", -1, EPSILON),
        ("rms_norm_eps", 0, EPSILON),
        ("rms_norm_eps", 1, EPSILON),
        ("rms_norm_eps", "small", EPSILON),
        ("rms_norm_eps", float("nan"), EPSILON),
        ("rms_norm_eps", "nan", EPSILON),
        ("rope_theta", -1, NUMBER),
        ("rope_theta", 0, NUMBER),
        ("rope_theta", float("inf"), NUMBER),
        ("rope_theta", True, NUMBER),
        ("tie_word_embeddings", "false", BOOLEAN),
        ("attention_bias", 0, BOOLEAN),
        ("rope_scaling", "linear", "an object is expected"),
        ("trtbuild", True, "an object is expected"),
    ],
)
def test_senseless_values(key, value, expected):
    with pytest.raises(UserError) as caught:
        config_from_hugging_face(LLAMA | {key: value}, "x")
    assert str(caught.value) == f"x: {key} has the wrong type or value: {value!r:.60}; {expected}"


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "linear", "factor": 0}, "factor has the wrong type or value: 0; a number above 0 is expected"),
        ({"type": "linear", "factor": float("nan")}, "factor has the wrong type or value: nan; a number above 0 is"),
        ({"type": 5, "factor": 4}, "type has the wrong type or value: 5; a word is expected"),
        ({"type": None, "factor": 4}, "RoPE scaling has a factor and no rope_type; give linear, dynamic, llama3"),
        ({"factor": 4}, "RoPE scaling has a factor and no rope_type; give linear, dynamic, llama3"),
        (
            {"type": "llama3", "factor": 8, "low_freq_factor": 4.0, "high_freq_factor": 4.0},
            "high_freq_factor 4.0 is not above low_freq_factor",
        ),
    ],
)
def test_senseless_scaling(scaling, message):
    with pytest.raises(UserError, match=f"^x: {message}"):
        config_from_hugging_face(LLAMA | {"rope_scaling": scaling}, "x")


def test_an_odd_head():
    with pytest.raises(UserError, match="x: the head size 15 is odd; RoPE rotates pairs"):
        config_from_hugging_face(LLAMA | {"head_dim": 15}, "x")


def test_nothing_is_written_of_a_senseless_model(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "x")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**31}))
    with pytest.raises(UserError, match=f"{folder}/config.json: num_hidden_layers has the wrong type or value"):
        make_checkpoint({"local": {"path": str(folder)}}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
