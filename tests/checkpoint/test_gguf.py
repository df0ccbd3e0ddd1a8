"""GGUF files written by the `gguf` package, read back as the Hugging Face model they came from."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import TOP, byte_tokens, write_gguf
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from trtbuild.checkpoint.gguf import read_gguf
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.errors import UserError

QUANTIZED = [getattr(gguf.GGMLQuantizationType, name) for name in ("F16", "BF16", "Q8_0", "Q4_0", "Q4_1")]


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request):
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
        tie_word_embeddings=request.param == "tied",
    )
    return LlamaForCausalLM(config)


def state(model):
    """The tensors to store: a tied head is the embedding and is not one of them."""
    tensors = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return {n: v + np.float32(0.1) * np.random.randn(*v.shape).astype(np.float32) for n, v in tensors.items()}


@pytest.fixture
def written(model, tmp_path):
    """A function that writes the model's file with changes, and the tensors in it."""
    tensors = state(model)
    write = lambda **changes: write_gguf(tmp_path / "model.gguf", model.config, tensors, **changes)  # noqa: E731
    write.tensors = tensors
    return write


def test_float32_gives_the_model_back(written, model):
    config, tensors = read_gguf(written())
    assert tensors.keys() == written.tensors.keys()
    for name, expected in written.tensors.items():
        assert tensors[name].shape == expected.shape
        np.testing.assert_array_equal(tensors[name].load().numpy(), expected, err_msg=name)
    expected = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e5,
        "tie_word_embeddings": model.config.tie_word_embeddings,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    assert config | expected == config


@pytest.mark.parametrize("kind", QUANTIZED, ids=lambda kind: kind.name)
def test_quantized_gives_what_gguf_dequantizes(written, kind):
    _, tensors = read_gguf(written(kind=kind))
    for name, original in written.tensors.items():
        expected = original
        if original.ndim == 2:  # rows are quantized one by one, so their order does not matter to a row's values
            expected = gguf.dequantize(gguf.quantize(original, kind), kind)
            assert not np.array_equal(expected, original)
        np.testing.assert_array_equal(tensors[name].load().numpy(), expected, err_msg=name)
        assert tensors[name].dtype == torch.float32


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F32, *QUANTIZED], ids=lambda kind: kind.name)
def test_same_tensors_and_configuration_as_transformers(written, model, kind):
    """Against what `from_pretrained(gguf_file=...)` calls (which itself asks for `accelerate`)."""
    path = written(kind=kind)
    config, tensors = read_gguf(path)
    theirs = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
    assert tensors.keys() == theirs["tensors"].keys()
    for name, tensor in theirs["tensors"].items():
        assert tensors[name].load().equal(tensor.float()), name
    ours, theirs = LlamaConfig(**config), LlamaConfig(**theirs["config"])
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"):
        assert getattr(ours, name) == getattr(theirs, name)
    for name in ("vocab_size", "max_position_embeddings", "tie_word_embeddings", "head_dim", "rope_parameters"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.rms_norm_eps == pytest.approx(theirs.rms_norm_eps, rel=1e-6)


def test_converted_checkpoint_computes_what_the_original_does(written, model, tmp_path):
    """From GGUF to canonical safetensors to `transformers`: the original model's logits."""
    make_checkpoint({"gguf": {"path": str(written())}}, tmp_path / "checkpoint")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    original = LlamaForCausalLM(model.config)
    missing = original.load_state_dict({n: torch.from_numpy(t) for n, t in written.tensors.items()}, strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    ids = torch.randint(260, (2, 17))
    with torch.inference_mode():
        torch.testing.assert_close(converted(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)


def test_tokenizer_of_smollm_keeps_digits_apart(written, tmp_path):
    from trtbuild.runtime.tokenizer import Tokenizer

    make_checkpoint({"gguf": {"path": str(written())}}, tmp_path / "checkpoint")
    tokenizer = Tokenizer(tmp_path / "checkpoint")
    tokens = byte_tokens()
    text = "he 1212 ü"
    ids = tokenizer.encode(text)
    assert [tokens[i] for i in ids] == ["he", "Ġ", "1", "2", "1", "2", "Ġ", "Ã", "¼"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_ids == (1,)


def test_linear_rope_scaling(written):
    path = written(more=[("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), ("add_rope_scaling_factor", 4.0)])
    assert read_gguf(path)[0]["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2'; only 'llama' is supported"),
        ({"leave_out": ["block_count"]}, "metadata key 'llama.block_count' is missing"),
        ({"leave_out": ["layer_norm_rms_epsilon"]}, "metadata key 'llama.attention.layer_norm_rms_epsilon' is missing"),
        ({"more": [("add_rope_scaling_type", gguf.RopeScalingType.YARN)]}, "RoPE scaling 'yarn' in GGUF is not"),
        (
            {"more": [("add_rope_scaling_type", gguf.RopeScalingType.LINEAR)]},
            "metadata key 'llama.rope.scaling.factor' is missing",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_unsupported_files(written, changes, message):
    path = written(**changes)
    with pytest.raises(UserError, match=message) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rope_freqs.weight", np.ones(8, np.float32), "RoPE scaling 'rope_freqs.weight'"),
        ("blk.0.attn_q_norm.weight", np.ones(16, np.float32), "tensor blk.0.attn_q_norm.weight is not part of a LLaMA"),
    ],
)
@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_unknown_tensors(tmp_path, model, monkeypatch, name, value, message):
    monkeypatch.setitem(TOP, "extra", name.removesuffix(".weight"))
    path = write_gguf(tmp_path / "x.gguf", model.config, state(model) | {"extra.weight": value})
    with pytest.raises(UserError, match=message):
        read_gguf(path)


@pytest.mark.parametrize("data", [b"", b"GG", b"not a GGUF file at all, only text" * 9], ids=["empty", "short", "text"])
def test_not_gguf(tmp_path, data):
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path} is truncated or not a GGUF file"):
        read_gguf(path)


@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_truncated_anywhere(written, tmp_path):
    """In the header, the metadata, the tensor table, the data: at 60 places."""
    data = written().read_bytes()
    path = tmp_path / "cut.gguf"
    for size in {*np.linspace(0, 12_000, 40, dtype=int), *np.linspace(12_000, len(data) - 1, 20, dtype=int)}:
        path.write_bytes(data[:size])
        with pytest.raises(UserError, match="is truncated or not a GGUF file"):
            read_gguf(path)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"/none\.gguf does not exist"):
        read_gguf(Path(tmp_path / "none.gguf"))


def test_an_unknown_splitting_is_refused(written, tmp_path):
    """transformers would split it as GPT-2 does, and every score would be of the wrong tokens."""
    path = written(pre="llama-bpe")
    with pytest.raises(UserError, match="splitting 'llama-bpe' is not supported from GGUF"):
        make_checkpoint({"gguf": {"path": str(path)}}, tmp_path / "x")
    assert not (tmp_path / "x").exists()
