"""GGUF files written by the `gguf` package, read back as the Hugging Face model they came from."""

import struct
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
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.evaluation.baseline import PortableBaseline

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
    write = lambda **changes: write_gguf(tmp_path / "model.gguf", model.config, tensors, **changes)
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
    from trtbuild.tokenizer.tokenizer import Tokenizer

    make_checkpoint({"gguf": {"path": str(written())}}, tmp_path / "checkpoint")
    tokenizer = Tokenizer(tmp_path / "checkpoint")
    tokens = byte_tokens()
    text = "he 1212 ü"
    ids = tokenizer.encode(text)
    assert [tokens[i] for i in ids] == ["he", "Ġ", "1", "2", "1", "2", "Ġ", "Ã", "¼"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_ids == (1,)


LINEAR = "add_rope_scaling_type", gguf.RopeScalingType.LINEAR
NONE = "add_rope_scaling_type", gguf.RopeScalingType.NONE


@pytest.mark.parametrize(
    ("more", "factor"),
    [
        ([LINEAR, ("rope.scaling.factor", 4.0)], 4),
        ([("rope.scaling.factor", 4.0)], 4),
        ([("rope.scale_linear", 4.0)], 4),
        ([("rope.scaling.factor", 2.0), ("rope.scale_linear", 4.0)], 2),
        ([NONE, ("rope.scaling.factor", 4.0)], None),
        ([LINEAR], None),
        ([("rope.scaling.factor", 0.0)], None),
        ([("rope.scaling.factor", 1.0)], None),
    ],
)
def test_linear_rope_scaling(written, more, factor):
    """As llama.cpp has it: linear is the default, and the old key stands in for the new one."""
    expected = {"rope_type": "linear", "factor": factor} if factor else None
    assert read_gguf(written(more=more))[0].get("rope_scaling") == expected


HARMLESS = [
    ("attention.causal", True),
    ("attention.value_length", 16),
    ("attention.key_length", 16),
    ("attention.scale", 0.25),
    ("rope.dimension_count", 16),
    ("expert_count", 0),
    ("logit_scale", 1.0),
    ("rope.scaling.finetuned", False),
    ("rope.scaling.original_context_length", 64),
    ("attention.head_count_kv", [2, 2]),
]


def test_metadata_that_changes_nothing(written):
    """Each value is what LLaMA computes anyway, and a number for every layer is read where all are equal."""
    expected, _ = read_gguf(written())
    config, tensors = read_gguf(written(more=HARMLESS, leave_out=["head_count_kv"]))
    assert config == expected
    assert all(tensors[name].load().numpy().tolist() == x.tolist() for name, x in written.tensors.items())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("attention.causal", False, "False, which is not computed; LLaMA's models have True"),
        ("attention.value_length", 32, "32, which is not computed; LLaMA's models have 16"),
        ("attention.clamp_kqv", 8.0, "8.0, which is not computed; LLaMA's models have 0"),
        ("attention.scale", 0.125, "0.125, which is not computed; LLaMA's models have 0 or 0.25"),
        ("attention.sliding_window", 64, "64, which"),
        ("rope.dimension_count", 8, "8, which is not computed; LLaMA's models have 16"),
        ("rope.scaling.attn_factor", 1.5, "1.5, which"),
        ("expert_count", 8, "8, which is not computed; LLaMA's models have 0"),
        ("logit_scale", 0.5, "0.5, which"),
        ("embedding_scale", 12.0, "12.0, which"),
        ("use_parallel_residual", True, "True, which"),
    ],
)
@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_metadata_of_another_model(written, key, value, message):
    with pytest.raises(UserError, match=rf"model\.gguf: llama\.{key} is {message}"):
        read_gguf(written(more=[(key, value)]))


@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_metadata_that_nobody_knows(written):
    with pytest.raises(UserError, match=r"the metadata key llama\.attention\.layer_norm_epsilon \(1\.0\) is not known"):
        read_gguf(written(more=[("attention.layer_norm_epsilon", 1.0)]))


@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_layers_that_differ(written):
    path = written(more=[("attention.head_count_kv", [2, 4])], leave_out=["head_count_kv"])
    with pytest.raises(UserError, match=r"llama\.attention\.head_count_kv differs by layer, \[2, 4\]"):
        read_gguf(path)


@pytest.mark.parametrize("names", [["q_proj", "k_proj", "v_proj", "o_proj"], ["o_proj"], ["q_proj"]])
@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_biases(model, tmp_path, names):
    """All, or any: what the file lacks is zero. transformers computes the same of the checkpoint."""
    config = LlamaConfig(**model.config.to_dict() | {"attention_bias": True})
    original = LlamaForCausalLM(config)
    for name, parameter in original.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter) if name.split(".")[-2] in names else torch.nn.init.zeros_(parameter)
    kept = {n: x for n, x in original.state_dict().items() if not n.endswith(".bias") or n.split(".")[-2] in names}
    path = write_gguf(tmp_path / "x.gguf", config, {name: x.numpy() for name, x in kept.items()})
    make_checkpoint({"gguf": {"path": str(path)}}, tmp_path / "checkpoint")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    ids = torch.randint(260, (2, 17))
    with torch.inference_mode():
        torch.testing.assert_close(converted(ids).logits, original(ids).logits, rtol=1e-5, atol=1e-5)


def test_scaled_logits(model, tmp_path):
    """A factor without a type, against transformers' model with linear scaling."""
    parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}
    scaled = LlamaForCausalLM(LlamaConfig(**model.config.to_dict() | {"rope_parameters": parameters})).eval()
    tensors = {name: x.numpy() for name, x in scaled.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    path = write_gguf(tmp_path / "x.gguf", scaled.config, tensors, more=[("rope.scaling.factor", 4.0)])
    make_checkpoint({"gguf": {"path": str(path)}}, tmp_path / "checkpoint")
    ids = torch.randint(260, (100,)).tolist()
    ours = PortableBaseline(tmp_path / "checkpoint", "float32", "cpu", None, BuildLimits(1, 100, 1), "").logits(ids)
    torch.testing.assert_close(ours, scaled(torch.tensor([ids])).logits[0].detach(), rtol=2e-5, atol=2e-5)


# Parts


@pytest.fixture
def parts(written):
    path = written(split_max_tensors=6)
    return sorted(path.parent.glob("model-*.gguf"))


@pytest.mark.parametrize("given", [0, 1, -1])
def test_split_files_are_read_from_any_part(parts, written, tmp_path, given):
    assert [path.name for path in parts] == [f"model-{i + 1:05d}-of-{len(parts):05d}.gguf" for i in range(len(parts))]
    assert len(parts) > 2
    make_checkpoint({"gguf": {"path": str(parts[given])}}, tmp_path / "x")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "x").state_dict()
    assert all(state[name].numpy().tolist() == x.tolist() for name, x in written.tensors.items())


@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_a_missing_part(parts):
    parts[1].unlink()
    with pytest.raises(UserError, match=f"{parts[1]}, a part of the same model as {parts[0].name}, does not exist"):
        read_gguf(parts[0])


@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_a_part_under_another_name(parts, tmp_path):
    renamed = parts[0].rename(tmp_path / "model.gguf")
    with pytest.raises(UserError, match=f"{renamed} is part 1 of {len(parts)}; the parts' names must say so"):
        read_gguf(renamed)


def test_a_folder(tmp_path):
    with pytest.raises(UserError, match=f"^{tmp_path} is a folder; give the GGUF file"):
        read_gguf(tmp_path)


def test_a_pointer_of_git_lfs(tmp_path):
    (tmp_path / "x.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n")
    with pytest.raises(UserError, match=r"x\.gguf is a Git LFS pointer, not the file itself; run 'git lfs pull'"):
        read_gguf(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt2"}, "architecture 'gpt2'; only 'llama' is supported"),
        ({"leave_out": ["block_count"]}, "metadata key llama.block_count is missing"),
        ({"leave_out": ["layer_norm_rms_epsilon"]}, "metadata key llama.attention.layer_norm_rms_epsilon is missing"),
        ({"more": [("add_rope_scaling_type", gguf.RopeScalingType.YARN)]}, "RoPE scaling 'yarn' in GGUF is not"),
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


@pytest.mark.parametrize("change", ["onto another", "into the file", "out of the file"])
@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_tensors_that_lie_elsewhere(written, change):
    """The package reads any bytes of the file for a tensor's."""
    path = written()
    tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.0.ffn_up.weight")
    offset = int(tensor.field.parts[-1][0])
    moved = {"onto another": 0, "into the file": offset + 32, "out of the file": 1 << 40}[change]
    content = path.read_bytes()
    at = content.index(b"blk.0.ffn_up.weight") + 19 + 4 + 2 * 8 + 4  # name, dimensions, type
    assert content[at : at + 8] == offset.to_bytes(8, "little")
    path.write_bytes(content[:at] + moved.to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(
        UserError, match=r"the tensor blk\.0\.ffn_up\.weight is said to begin|is truncated or not a GGUF"
    ):
        read_gguf(path)


@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_text_that_is_not_utf8(written):
    path = written()
    path.write_bytes(path.read_bytes().replace(b"smollm", b"sm\xffllm"))
    with pytest.raises(
        UserError, match=r"the metadata key tokenizer\.ggml\.pre cannot be read .*; fetch the file again"
    ):
        read_gguf(path)


@pytest.mark.parametrize(
    ("key", "at", "code", "value", "reason"),
    [
        (b"tokenizer.ggml.tokens", 8, "<Q", 2**60, "an array of 1152921504606846976 values; at most 1048576"),
        (b"tokenizer.ggml.token_type", 8, "<Q", 2**19, "a length reaches beyond its end"),
        (b"tokenizer.ggml.pre", 4, "<Q", 2**62, "a length reaches beyond its end"),
        (b"tokenizer.ggml.pre", 0, "<I", 77, "77"),
    ],
)
@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_lengths_that_cannot_be(written, key, at, code, value, reason):
    """The package counts to any of them, and fills the memory."""
    path = written()
    content = bytearray(path.read_bytes())
    struct.pack_into(code, content, content.index(key) + len(key) + at, value)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"is truncated or not a GGUF file \({reason}"):
        read_gguf(path)


@pytest.mark.parametrize("model", ["untied"], indirect=True)
def test_heads_without_channels(written):
    with pytest.raises(UserError, match="the heads have 0 channels; a positive integer is expected"):
        read_gguf(written(more=[("attention.key_length", 0), ("embedding_length", 0)], leave_out=("embedding_length",)))
