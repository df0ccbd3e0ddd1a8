"""Published models of every family, converted: bit by bit, against oracles, in little memory, or not at all."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from published_models import (
    LLAMA,
    QWEN,
    Tensors,
    baichuan_config,
    baichuan_tensors,
    llama_tensors,
    qwen_tensors,
    write_meta,
    write_published,
)
from reference_models import baichuan_logits, qwen_logits
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trtbuild.checkpoint import dummy
from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.dummy import save_byte_tokenizer
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.errors import UserError
from trtbuild.files import MARKER
from trtbuild.models.config import ModelConfig
from trtbuild.models.families import baichuan, canonical_config, config_from_hugging_face
from trtbuild.tokenizer import chat_template
from trtbuild.tokenizer.tokenizer import Tokenizer

REPOSITORY = Path(__file__).parent.parent.parent
VERSIONS = ("v1_7b", "v1_13b", "v2_7b", "v2_13b")
KINDS = ("llama", "qwen", *VERSIONS)
kinds = pytest.mark.parametrize("kind", KINDS)
published_names = pytest.mark.parametrize("kind", KINDS[1:])  # not canonical ones


def config_of(kind: str) -> dict:
    return {"llama": LLAMA, "qwen": QWEN}.get(kind) or baichuan_config(kind)


def tensors_of(kind: str, dtype: torch.dtype = torch.float32) -> Tensors:
    make = {"llama": llama_tensors, "qwen": qwen_tensors}.get(kind, baichuan_tensors)
    return {name: x.to(dtype) for name, x in make(config_of(kind)).items()}


def source(kind: str, folder: Path) -> dict:
    """The tiny Baichuans have a vocabulary of neither generation."""
    return {"local": {"path": str(folder)} | ({"model_version": kind} if kind in VERSIONS else {})}


def publish(kind: str, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Tensors:
    tensors = tensors_of(kind, dtype)
    config = config_of(kind) | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_published(folder, config, tensors, **options)
    return tensors


def convert(kind: str, folder: Path, out: Path) -> Tensors:
    make_checkpoint(source(kind, folder), out)
    return load_file(out / "model.safetensors")


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def refused(source: dict, out: Path, message: str) -> None:
    """The source is refused with exactly this line, and nothing is left beside `out`."""
    before = set(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        make_checkpoint(source, out)
    assert str(caught.value) == message
    assert set(out.parent.iterdir()) == before


# Tensors

QWEN_LAYER = {
    "input_layernorm.weight": "ln_1.weight",
    "self_attn.o_proj.weight": "attn.c_proj.weight",
    "post_attention_layernorm.weight": "ln_2.weight",
    "mlp.up_proj.weight": "mlp.w1.weight",
    "mlp.gate_proj.weight": "mlp.w2.weight",
    "mlp.down_proj.weight": "mlp.c_proj.weight",
}


def expected_tensors(kind: str, tensors: Tensors) -> Tensors:
    """What the models of 3 layers and 48 dimensions become; the head as it is."""
    if kind == "llama":
        return tensors
    qwen = kind == "qwen"
    expected = {
        "model.embed_tokens.weight": tensors["transformer.wte.weight" if qwen else "model.embed_tokens.weight"],
        "model.norm.weight": tensors["transformer.ln_f.weight" if qwen else "model.norm.weight"],
        "lm_head.weight": tensors["lm_head.weight"],
    }
    for i in range(3):
        ours, theirs = f"model.layers.{i}", f"transformer.h.{i}" if qwen else f"model.layers.{i}"
        for name, old in QWEN_LAYER.items():
            expected[f"{ours}.{name}"] = tensors[f"{theirs}.{old if qwen else name}"]
        for end in ("weight", "bias") if qwen else ("weight",):
            fused = tensors[f"{theirs}.{'attn.c_attn' if qwen else 'self_attn.W_pack'}.{end}"]
            assert len(fused) == 144
            expected |= {
                f"{ours}.self_attn.q_proj.{end}": fused[:48],
                f"{ours}.self_attn.k_proj.{end}": fused[48:96],
                f"{ours}.self_attn.v_proj.{end}": fused[96:],
            }
    return expected


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("safetensors", "shards"),
    [(False, 1), (False, 4), (True, 1), (True, 3)],
    ids=["bin", "bins", "safetensors", "shards"],
)
def test_every_tensor_bit_by_bit(kind, dtype, safetensors, shards, tmp_path):
    tensors = publish(kind, tmp_path / "x", dtype, safetensors=safetensors, shards=shards)
    if kind == "llama" and safetensors:
        make_checkpoint(source(kind, tmp_path / "x"), tmp_path / "out")  # linked, as it is
        converted = {name: x.load() for name, x in Checkpoint(tmp_path / "out").tensors.items()}
    else:
        converted = convert(kind, tmp_path / "x", tmp_path / "out")
    expected = expected_tensors(kind, tensors)
    assert converted.keys() == expected.keys()
    for name, x in expected.items():
        assert converted[name].dtype == dtype
        if name != "lm_head.weight" or not kind.startswith("v2"):
            assert converted[name].equal(x), name


def test_layers_of_two_digits(tmp_path):
    config = QWEN | {"num_hidden_layers": 12}
    tensors = qwen_tensors(config)
    write_published(tmp_path / "x", config, tensors)
    converted = convert("qwen", tmp_path / "x", tmp_path / "out")
    for i in (1, 10, 11):
        assert converted[f"model.layers.{i}.mlp.up_proj.weight"].equal(tensors[f"transformer.h.{i}.mlp.w1.weight"])
    assert len(converted) == 12 * 12 + 3


@kinds
def test_rotary_frequencies_are_dropped(kind, tmp_path):
    prefix = "transformer." if kind == "qwen" else "model.layers.0.self_attn."
    tensors = tensors_of(kind)
    write_published(tmp_path / "x", config_of(kind), tensors | {f"{prefix}rotary_emb.inv_freq": torch.ones(8)})
    assert convert(kind, tmp_path / "x", tmp_path / "out").keys() == expected_tensors(kind, tensors).keys()


# NormHead


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    x = x.double()
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("rows", [100, 320, 8192])
@pytest.mark.parametrize("version", ["v2_7b", "v2_13b"])
def test_the_head_of_baichuan2_has_unit_rows(version, rows, tmp_path, monkeypatch):
    """Also where the last of the parts in which it is computed is a small one."""
    monkeypatch.setattr(baichuan, "NORM_ROWS", rows)
    tensors = publish(version, tmp_path / "x")
    head = convert(version, tmp_path / "x", tmp_path / "out")["lm_head.weight"].double()
    assert (head.norm(dim=1) - 1).abs().max() < 1e-6
    assert (head - unit_rows(tensors["lm_head.weight"])).abs().max() < 1e-7


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 11)])
def test_the_head_of_baichuan2_is_rounded_once(dtype, bits, tmp_path):
    """Every number is within half a unit in the last place of the exact one."""
    tensors = publish("v2_7b", tmp_path / "x", dtype)
    head = convert("v2_7b", tmp_path / "x", tmp_path / "out")["lm_head.weight"]
    exact = unit_rows(tensors["lm_head.weight"])
    assert head.dtype == dtype
    half_unit = 2.0 ** (exact.abs().log2().floor().clamp(min=-14) - bits)
    error = (head.double() - exact).abs() / half_unit
    assert 0.98 < error.max() < 1.001


@pytest.mark.parametrize("version", ["v1_7b", "v1_13b"])
def test_the_head_of_the_first_baichuan_stays(version, tmp_path):
    tensors = publish(version, tmp_path / "x")
    assert convert(version, tmp_path / "x", tmp_path / "out")["lm_head.weight"].equal(tensors["lm_head.weight"])


# The network: transformers computes from the converted folder what the published model does


@pytest.mark.parametrize("kind", ["qwen", "v1_7b", "v2_7b"])
@torch.inference_mode()
def test_transformers_computes_the_published_model(kind, tmp_path):
    tensors = publish(kind, tmp_path / "x", shards=2)
    convert(kind, tmp_path / "x", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert type(model).__name__ == ("Qwen2ForCausalLM" if kind == "qwen" else "LlamaForCausalLM")
    generator = torch.Generator().manual_seed(2)
    for tokens in (1, 7, 300):
        ids = torch.randint(320, (tokens,), generator=generator)
        if kind == "qwen":
            expected = qwen_logits(QWEN, tensors, ids.tolist())
        else:
            expected = baichuan_logits(config_of(kind), tensors, ids.tolist(), kind)
        error = (model(ids[None]).logits[0].double() - expected).norm() / expected.norm()
        assert error < 1e-5


# Folders


@published_names
def test_what_is_written(kind, tmp_path):
    publish(kind, tmp_path / "x")
    (tmp_path / "x" / "modeling.py").write_text("raise SystemExit('code of a model was run')")
    (tmp_path / "x" / "generation_config.json").write_text('{"temperature": 0.3}')
    convert(kind, tmp_path / "x", tmp_path / "out")
    files = {file.name: file for file in (tmp_path / "out").iterdir() if file.name != MARKER}
    linked = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert files.keys() == {"config.json", "model.safetensors"} | linked
    assert {name for name, file in files.items() if file.is_symlink()} == linked
    published = read_config(tmp_path / "x")
    assert read_config(tmp_path / "out") == canonical_config(published, "x", kind if kind in VERSIONS else None)


@kinds
def test_a_converted_folder_is_linked(kind, tmp_path):
    """It is canonical, of any vocabulary: nothing has to be said of it."""
    publish(kind, tmp_path / "x")
    convert(kind, tmp_path / "x", tmp_path / "out")
    make_checkpoint({"local": {"path": str(tmp_path / "out")}}, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).readlink() == tmp_path / "out" / name
    assert Checkpoint(tmp_path / "again").config == Checkpoint(tmp_path / "out").config
    extension = read_config(tmp_path / "again").get("trtbuild")
    assert extension == read_config(tmp_path / "out").get("trtbuild")
    assert (extension is None) == (kind == "llama")


def test_llama_in_safetensors_is_linked(tmp_path):
    publish("llama", tmp_path / "x", safetensors=True, shards=2)
    make_checkpoint(source("llama", tmp_path / "x"), tmp_path / "out")
    files = {file.name for file in (tmp_path / "out").iterdir() if file.is_symlink()}
    shards = {f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}
    index = {"model.safetensors.index.json"}
    assert files == {"config.json", "tokenizer.json", "tokenizer_config.json"} | shards | index


@pytest.mark.parametrize("weights", [True, False], ids=["both", "index only"])
def test_llama_in_both_formats_is_linked(weights, tmp_path):
    """The hub's repositories have both; what is fetched is safetensors, and the index of the others."""
    tensors = publish("llama", tmp_path / "x", safetensors=True)
    publish("llama", tmp_path / "old", shards=2)
    for file in (tmp_path / "old").glob("pytorch_model*" if weights else "pytorch_model*.json"):
        shutil.copy(file, tmp_path / "x")
    make_checkpoint(source("llama", tmp_path / "x"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_symlink()
    checkpoint = Checkpoint(tmp_path / "out")
    assert all(checkpoint[name].load().equal(x) for name, x in tensors.items())


def test_qwen_in_both_formats_is_read_from_safetensors(tmp_path):
    tensors = publish("qwen", tmp_path / "x", safetensors=True)
    (tmp_path / "x" / "pytorch_model.bin").write_bytes(b"damaged")
    converted = convert("qwen", tmp_path / "x", tmp_path / "out")
    assert converted["model.norm.weight"].equal(tensors["transformer.ln_f.weight"])


def test_llama_in_bin_becomes_safetensors(tmp_path):
    tensors = publish("llama", tmp_path / "x", torch.float16, shards=3)
    converted = convert("llama", tmp_path / "x", tmp_path / "out")
    assert all(converted[name].equal(x) for name, x in tensors.items())
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()
    assert not list((tmp_path / "out").glob("*.bin*"))
    assert read_config(tmp_path / "out") == read_config(tmp_path / "x")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.float16
    assert model.lm_head.weight.equal(tensors["lm_head.weight"])


@published_names
def test_a_published_folder_is_no_checkpoint(kind, tmp_path):
    folder = tmp_path / "x"
    config = config_of(kind) | {"vocab_size": {"1": 64000, "2": 125696}.get(kind[1], 320)}
    write_published(folder, config, {})
    with pytest.raises(UserError) as caught:
        Checkpoint(folder)
    family = "qwen" if kind == "qwen" else "baichuan"
    assert str(caught.value) == (
        f"{folder} is a published {family} model, not a checkpoint; make a checkpoint with "
        f"'trtbuild convert --local {folder} --output-dir CHECKPOINT'"
    )


# Tokenizers


@pytest.mark.parametrize(
    ("kind", "file"), [("qwen", "qwen.tiktoken"), ("v2_7b", "tokenizer.model"), ("llama", "tokenizer.model")]
)
def test_no_tokenizer(kind, file, tmp_path):
    publish(kind, tmp_path / "x", tokenizer=lambda folder: None)
    refused(
        source(kind, tmp_path / "x"),
        tmp_path / "out",
        f"{tmp_path / 'x'} has neither tokenizer.json nor {file}; fetch its tokenizer",
    )


def test_tokenizer_of_qwen(tmp_path):
    """Made of the 256 bytes, one word and the special tokens: a chat ends with either end token."""
    ranks = [*(bytes([byte]) for byte in range(256)), b"hi"]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks)]

    def save(folder: Path) -> None:
        (folder / "qwen.tiktoken").write_text("".join(lines))
        (folder / "generation_config.json").write_text('{"eos_token_id": 1}')

    config = QWEN | {"vocab_size": 512}
    write_published(tmp_path / "x", config, qwen_tensors(config), tokenizer=save)
    convert("qwen", tmp_path / "x", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "<|im_start|>hi there<|im_end|>"
    assert tokenizer.encode(text) == [258, 256, *b" there", 259]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [257, 259]}


@pytest.fixture(scope="module")
def sentencepiece_model() -> bytes:
    """A few hundred pieces, the two that begin a chat's turns in Baichuan2 among them."""
    return train_sentencepiece(["<reserved_106>", "<reserved_107>"])


def train_sentencepiece(symbols: list[str]) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the mountain is high and the river is long"] * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        normalization_rule_name="identity",
        user_defined_symbols=symbols,
        minloglevel=2,
    )
    return model.getvalue()


def beside(model: bytes, **files: object):
    """A maker of `tokenizer.model` and JSON files beside it."""

    def save(folder: Path) -> None:
        (folder / "tokenizer.model").write_bytes(model)
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))

    return save


@pytest.mark.parametrize("add_bos", [True, False])
def test_tokenizer_of_llama(add_bos, sentencepiece_model, tmp_path):
    """Its configuration says whether a text has a beginning, and what a chat looks like."""
    config = {"add_bos_token": add_bos, "chat_template": "{{ messages[0].content }}!"}
    publish("llama", tmp_path / "x", tokenizer=beside(sentencepiece_model, tokenizer_config=config))
    convert("llama", tmp_path / "x", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    assert tokenizer.encode("the river") == [processor.bos_id()] * add_bos + processor.encode("the river")
    assert tokenizer.encode("the river", chat=True) == processor.encode("the river!")


def test_tokenizer_of_baichuan(sentencepiece_model, tmp_path):
    """No beginning; what begins a turn is one token, and none of the text."""
    publish("v2_7b", tmp_path / "x", tokenizer=beside(sentencepiece_model))
    make_checkpoint(source("v2_7b", tmp_path / "x"), tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out", chat_template.read("baichuan2"))
    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    user, assistant = (processor.piece_to_id(f"<reserved_{i}>") for i in (106, 107))
    ids = tokenizer.encode("the river", chat=True)
    assert ids == [user, *processor.encode("the river"), assistant]
    assert tokenizer.decode(ids).strip() == "the river"


@pytest.mark.parametrize(("version", "special"), [("v1_13b", (102, 103)), ("v2_13b", (106, 107))])
def test_roles_of_the_other_baichuan_are_text(version, special, tmp_path):
    """In each generation's vocabulary are the pieces of both."""
    symbols = {i: f"<reserved_{i}>" for i in (102, 103, 106, 107)}
    model = train_sentencepiece([*symbols.values()])
    publish(version, tmp_path / "x", tokenizer=beside(model))
    convert(version, tmp_path / "x", tmp_path / "out")
    tokenizer = Tokenizer(tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    expected = tuple(processor.piece_to_id(symbols[i]) for i in special)
    assert tokenizer.special_token_ids(tuple(symbols.values())) == expected
    for i in symbols.keys() - special:
        text = f"the {symbols[i]}river"
        assert tokenizer.encode(text) == processor.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokens_that_the_original_file_lacks(sentencepiece_model, tmp_path):
    publish("llama", tmp_path / "x", tokenizer=beside(sentencepiece_model, added_tokens={"<s>": 1, "<pad>": 310}))
    refused(
        source("llama", tmp_path / "x"),
        tmp_path / "out",
        f"{tmp_path / 'x'}/added_tokens.json has the token '<pad>', tokenizer.model does not; "
        "save it as tokenizer.json",
    )


# What is wrong: nothing is written


@published_names
@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "hidden_size"])
def test_a_missing_key(kind, key, tmp_path):
    publish(kind, tmp_path / "x")
    config = {name: x for name, x in config_of(kind).items() if name != key}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    message = f"{tmp_path / 'x' / 'config.json'}: the key '{key}' is missing"
    refused(source(kind, tmp_path / "x"), tmp_path / "out", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "{} is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("3", "{} holds a JSON int; an object is expected"),
        (None, "{} does not exist"),
    ],
)
def test_no_configuration(content, message, tmp_path):
    publish("qwen", tmp_path / "x")
    file = tmp_path / "x" / "config.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    refused(source("qwen", tmp_path / "x"), tmp_path / "out", message.format(file))


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_another_generation(model_type, tmp_path):
    write_published(tmp_path / "x", QWEN | {"model_type": model_type}, {})
    refused(
        {"local": {"path": str(tmp_path / "x")}},
        tmp_path / "out",
        f"{tmp_path / 'x' / 'config.json'}: model_type {model_type!r} is another generation than the supported 'qwen'; "
        "supported are baichuan (Baichuan and Baichuan2), llama (LLaMA, CodeLlama, Yi), "
        "qwen (the first Qwen, QWenLMHeadModel)",
    )


def test_a_baichuan_whose_version_is_not_given(tmp_path):
    publish("v2_7b", tmp_path / "x")
    where = tmp_path / "x" / "config.json"
    refused(
        {"local": {"path": str(tmp_path / "x")}},
        tmp_path / "out",
        f"{where}: a Baichuan of 320 words may be of either generation; give model_version, one of "
        "v1_7b, v1_13b, v2_7b, v2_13b",
    )
    refused(
        {"local": {"path": str(tmp_path / "x"), "model_version": "v2_13b"}},
        tmp_path / "out",
        f"{where}: model_version is given as v2_13b, but this is v2_7b",
    )


C_ATTN = "transformer.h.1.attn.c_attn.weight"
W_PACK = "model.layers.1.self_attn.W_pack.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("kind", "name", "shape", "canonical", "actual", "expected"),
    [
        ("qwen", C_ATTN, (96, 48), Q_PROJ, (32, 48), (48, 48)),
        ("qwen", C_ATTN, (145, 48), Q_PROJ.replace("q_", "v_"), (49, 48), (48, 48)),
        ("qwen", C_ATTN, (144, 40), Q_PROJ, (48, 40), (48, 48)),
        ("qwen", C_ATTN.replace("weight", "bias"), (96,), Q_PROJ.replace("weight", "bias"), (32,), (48,)),
        ("qwen", "transformer.wte.weight", (319, 48), "model.embed_tokens.weight", (319, 48), (320, 48)),
        ("qwen", "lm_head.weight", (384, 48), "lm_head.weight", (384, 48), (320, 48)),
        (
            "qwen",
            "transformer.h.0.mlp.w2.weight",
            (160, 48),
            "model.layers.0.mlp.gate_proj.weight",
            (160, 48),
            (80, 48),
        ),
        ("v1_13b", W_PACK, (48, 48), Q_PROJ, (16, 48), (48, 48)),
        ("v2_7b", "lm_head.weight", (321, 48), "lm_head.weight", (321, 48), (320, 48)),
        ("v2_13b", "model.embed_tokens.weight", (64, 48), "model.embed_tokens.weight", (64, 48), (320, 48)),
        ("llama", "model.layers.2.mlp.down_proj.weight", (48, 79), None, (48, 79), (48, 80)),
    ],
)
def test_a_tensor_of_another_shape(kind, name, shape, canonical, actual, expected, tmp_path):
    tensors = tensors_of(kind)
    assert name in tensors
    write_published(tmp_path / "x", config_of(kind), tensors | {name: torch.ones(shape)})
    refused(
        source(kind, tmp_path / "x"),
        tmp_path / "out",
        f"{tmp_path / 'x'}: tensor {canonical or name} has shape {actual}, config.json asks for {expected}",
    )


@pytest.mark.parametrize(
    ("kind", "name", "canonical"),
    [
        ("qwen", "transformer.h.0.attn.c_proj.bias", "model.layers.0.self_attn.o_proj.bias"),
        ("qwen", "transformer.h.3.ln_1.weight", "model.layers.3.input_layernorm.weight"),
        ("qwen", "transformer.h.0.attn.masked_bias", "transformer.h.0.attn.masked_bias"),
        ("qwen", "transformer.visual.proj", "transformer.visual.proj"),
        ("v2_7b", "model.layers.0.self_attn.W_pack.bias", "model.layers.0.self_attn.W_pack.bias"),
        ("v1_13b", "model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
    ],
)
def test_a_tensor_that_the_model_does_not_have(kind, name, canonical, tmp_path):
    write_published(tmp_path / "x", config_of(kind), tensors_of(kind) | {name: torch.ones(48)})
    refused(
        source(kind, tmp_path / "x"),
        tmp_path / "out",
        f"{tmp_path / 'x'}: the tensor {canonical} is no part of the model that config.json describes",
    )


@pytest.mark.parametrize(
    ("kind", "missing", "canonical"),
    [
        ("qwen", C_ATTN, Q_PROJ),
        ("qwen", "transformer.ln_f.weight", "model.norm.weight"),
        ("v1_7b", W_PACK, Q_PROJ),
        ("v2_13b", "lm_head.weight", "lm_head.weight"),
    ],
)
def test_a_tensor_is_missing(kind, missing, canonical, tmp_path):
    tensors = tensors_of(kind)
    shape = tuple(expected_tensors(kind, tensors)[canonical].shape)
    del tensors[missing]
    write_published(tmp_path / "x", config_of(kind), tensors)
    refused(
        source(kind, tmp_path / "x"),
        tmp_path / "out",
        f"{tmp_path / 'x'}: tensor {canonical} is missing; config.json asks for it with shape {shape}",
    )


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.complex64, torch.bool])
def test_numbers_that_are_none(dtype, tmp_path):
    tensors = tensors_of("qwen")
    tensors["transformer.ln_f.weight"] = torch.ones(48, dtype=dtype)
    write_published(tmp_path / "x", QWEN, tensors)
    refused(
        source("qwen", tmp_path / "x"),
        tmp_path / "out",
        f"{tmp_path / 'x'}: tensor model.norm.weight is {str(dtype).removeprefix('torch.')}, and nothing says how it "
        "is quantized; a floating-point tensor, or its scales, are expected",
    )


@pytest.mark.parametrize(
    ("kind", "description"),
    [
        ("qwen", "the first Qwen, QWenLMHeadModel"),
        ("v2_7b", "Baichuan and Baichuan2"),
        ("llama", "LLaMA, CodeLlama, Yi"),
    ],
)
def test_quantized_weights_of_old_formats(kind, description, tmp_path):
    config = config_of(kind) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    write_published(tmp_path / "x", config, tensors_of(kind))
    refused(
        source(kind, tmp_path / "x"),
        tmp_path / "out",
        f"{tmp_path / 'x'} is quantized, which is read from safetensors under LLaMA's names alone; start from the "
        "original",
    )


class Harm:
    """What creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@kinds
def test_a_file_of_objects_is_not_executed(kind, tmp_path):
    tensors = tensors_of(kind)
    write_published(tmp_path / "x", config_of(kind), tensors)
    file = tmp_path / "x" / "pytorch_model.bin"
    torch.save(tensors | {"lm_head.weight": Harm(tmp_path / "harm")}, file)
    reason = "Unsupported global: GLOBAL io.open was not an allowed global by default"
    refused(
        source(kind, tmp_path / "x"),
        tmp_path / "out",
        f"{file} holds more than tensors, and is not read: {reason}",
    )
    torch.load(file, weights_only=False)
    assert (tmp_path / "harm").exists()


def test_an_earlier_checkpoint_stays(tmp_path):
    """A failure leaves what was there, and no temporary."""
    tensors = publish("qwen", tmp_path / "x")
    convert("qwen", tmp_path / "x", tmp_path / "out")
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    write_published(tmp_path / "y", QWEN, tensors | {"lm_head.weight": torch.ones(5, 48)})
    with pytest.raises(UserError, match=r"lm_head\.weight has shape"):
        make_checkpoint(source("qwen", tmp_path / "y"), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"x", "y", "out"}


@pytest.mark.parametrize(
    ("kind", "change", "tensors"),
    [
        ("llama", {"num_hidden_layers": "three"}, {}),
        ("qwen", {"num_hidden_layers": None}, {}),
        ("v1_7b", {"num_hidden_layers": 3.5}, {}),
        ("qwen", {}, {C_ATTN.replace("weight", "bias"): torch.tensor(1.0)}),
        ("qwen", {}, {"lm_head.weight": torch.ones(320, 48).to_sparse()}),
    ],
    ids=["text", "null", "float", "no dimension", "sparse"],
)
def test_faults_are_named(kind, change, tensors, tmp_path):
    write_published(tmp_path / "x", config_of(kind) | change, {})
    torch.save(tensors_of(kind) | tensors, tmp_path / "x" / "pytorch_model.bin")
    with pytest.raises(UserError, match=str(tmp_path / "x")):
        make_checkpoint(source(kind, tmp_path / "x"), tmp_path / "out")


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"rms_norm_eps": "1e-6x"}),
        ("qwen", {"layer_norm_epsilon": [1e-6]}),
        ("v2_13b", {"model_max_length": "4k"}),
        ("v1_7b", {"num_attention_heads": 1.5}),
    ],
)
def test_values_of_the_wrong_type(kind, change):
    config = config_of(kind) | change
    with pytest.raises(UserError, match="wrong type"):
        ModelConfig.from_canonical(canonical_config(config, "x", kind if kind in VERSIONS else None), "x")


# The hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that gives the files of `tmp_path / "repository"`; returns what it was asked."""
    asked = []

    def download(repo: str, **options) -> str:
        asked.append({"repo": repo} | options)
        there = tmp_path / "snapshot"
        there.mkdir(exist_ok=True)
        for pattern in options["allow_patterns"]:
            for file in (tmp_path / "repository").glob(pattern):
                shutil.copy(file, there)
        return str(there)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return asked


@pytest.mark.parametrize("safetensors", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen", "v2_7b"])
def test_from_the_hub(kind, safetensors, hub, tmp_path):
    """Old weights are fetched only where there are no others, and code never."""
    tensors = publish(kind, tmp_path / "repository", safetensors=safetensors, shards=2)
    (tmp_path / "repository" / "modeling.py").write_text("raise SystemExit('code of a model was fetched')")
    if safetensors:
        publish(kind, tmp_path / "old", shards=2)
        for file in (tmp_path / "old").glob("pytorch_model*"):
            shutil.copy(file, tmp_path / "repository")
    options = {"repo": "o/n", "revision": "abc"} | ({"model_version": kind} if kind in VERSIONS else {})
    make_checkpoint({"hub": options}, tmp_path / "out")
    assert [(call["repo"], call["revision"]) for call in hub] == [("o/n", "abc")] * (1 if safetensors else 2)
    snapshot = {file.suffix for file in (tmp_path / "snapshot").iterdir()}
    assert snapshot == {".json", ".safetensors" if safetensors else ".bin"}
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint["model.norm.weight"].load().equal(expected_tensors(kind, tensors)["model.norm.weight"])
    assert (tmp_path / "out" / "model.safetensors").exists() == (kind != "llama" or not safetensors)  # else linked


def test_tokenizers_are_fetched_from_the_hub(hub, tmp_path):
    publish("qwen", tmp_path / "repository", tokenizer=lambda folder: None)
    for name in ("qwen.tiktoken", "tokenizer.model", "tokenization_qwen.py"):
        (tmp_path / "repository" / name).touch()
    with pytest.raises(UserError):  # they are empty
        make_checkpoint({"hub": {"repo": "o/n", "revision": "abc"}}, tmp_path / "out")
    names = {file.name for file in (tmp_path / "snapshot").iterdir()}
    assert names == {"config.json", "pytorch_model.bin", "qwen.tiktoken", "tokenizer.model"}


@pytest.mark.parametrize("repo", ["Qwen/Qwen-7B", "meta-llama/Llama-2-7b-hf"])
def test_the_hub_is_out_of_reach(repo, tmp_path):
    with pytest.raises(UserError) as caught:
        make_checkpoint({"hub": {"repo": repo, "revision": "0123abc"}}, tmp_path / "out")
    message = str(caught.value)
    assert message.startswith(f"cannot fetch {repo} at revision 0123abc from the hub (")
    assert message.endswith(
        "); check the name, the network and, for gated models, HF_TOKEN. To rehearse the workflow without a download: "
        "snakemake results/rehearsal/MODEL/RECIPE/rouge.json"
    )
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_the_hub_goes_away(tmp_path, monkeypatch):
    """In the middle of a file: the client gives its HTTP library's own error after five trials."""
    httpx = pytest.importorskip("httpx2")

    def download(repo: str, **_) -> str:
        raise httpx.ReadTimeout("timed out")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match="cannot fetch o/n at revision abc"):
        make_checkpoint({"hub": {"repo": "o/n", "revision": "abc"}}, tmp_path / "out")


# Dummy weights


def real_config(kind: str) -> dict:
    """Baichuan's generations are known by their real vocabularies."""
    return config_of(kind) | ({"vocab_size": 64000 if kind[1] == "1" else 125696} if kind in VERSIONS else {})


def dummies(kind: str, folder: Path, **options) -> Tensors:
    make_checkpoint({"dummy": {"config": real_config(kind)} | options}, folder)
    return load_file(folder / "model.safetensors")


@kinds
def test_dummy_of_a_published_configuration(kind, tmp_path):
    tensors = dummies(kind, tmp_path / "out")
    config = config_from_hugging_face(real_config(kind), "x")
    assert Checkpoint(tmp_path / "out").config == config
    assert {name: tuple(x.shape) for name, x in tensors.items()} == config.tensor_shapes()
    assert read_config(tmp_path / "out").get("trtbuild") == canonical_config(real_config(kind), "x").get("trtbuild")


@pytest.mark.parametrize("kind", ["llama", "qwen", "v1_13b"])
def test_dummy_of_fewer_layers(kind, tmp_path):
    """The layers that are left have the same values."""
    whole = dummies(kind, tmp_path / "3", num_layers=3)
    for layers in (1, 2):
        tensors = dummies(kind, tmp_path / str(layers), num_layers=layers)
        assert read_config(tmp_path / str(layers))["num_hidden_layers"] == layers
        assert {name.split(".")[2] for name in tensors if ".layers." in name} == set(map(str, range(layers)))
        assert all(x.equal(whole[name]) for name, x in tensors.items())
    for layers in (-1, 0, 4):
        refused(
            {"dummy": {"config": real_config(kind), "num_layers": layers}},
            tmp_path / "out",
            f"dummy.config: num_layers is {layers}; the model has 3",
        )


@pytest.mark.parametrize(
    ("kind", "change", "dtype", "expected"),
    [
        ("llama", {"torch_dtype": "float16"}, None, "float16"),
        ("llama", {"torch_dtype": None, "dtype": "bfloat16"}, None, "bfloat16"),
        ("llama", {"torch_dtype": None}, None, "float32"),
        ("llama", {"torch_dtype": "float16"}, "bfloat16", "bfloat16"),
        ("qwen", {"torch_dtype": "float16"}, None, "float16"),
        ("qwen", {"torch_dtype": None}, None, "bfloat16"),
        ("qwen", {"torch_dtype": "float16"}, "float32", "float32"),
        ("v1_7b", {"torch_dtype": "float16", "vocab_size": 64000}, None, "float16"),
        ("v1_7b", {"torch_dtype": "float16", "vocab_size": 64000}, "float32", "float32"),
    ],
)
def test_dtype_of_dummies(kind, change, dtype, expected, tmp_path):
    options = {} if dtype is None else {"dtype": dtype}
    make_checkpoint({"dummy": {"config": config_of(kind) | change, "num_layers": 1} | options}, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in tensors.values()} == {getattr(torch, expected)}
    assert read_config(tmp_path / "out")["dtype"] == expected


@pytest.mark.parametrize("kind", ["qwen", "v1_7b"])
def test_the_same_seed_gives_the_same_dummies(kind, tmp_path):
    a, b, c = (dummies(kind, tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4)))
    assert all(x.equal(b[name]) for name, x in a.items())
    assert all(x.ne(c[name]).any() for name, x in a.items() if not name.endswith("norm.weight"))


def test_large_dummies_repeat_a_block(tmp_path, monkeypatch):
    """Of the numbers up to which all are drawn, which leaves those of smaller tensors as they are."""
    drawn = dummies("qwen", tmp_path / "drawn")
    monkeypatch.setattr(dummy, "BLOCK", 1000)
    repeated = dummies("qwen", tmp_path / "repeated")
    for name, x in repeated.items():
        flat = x.flatten()
        if len(flat) <= 1000 or name.endswith("norm.weight"):
            assert x.equal(drawn[name])
        else:
            assert flat.equal(flat[:1000].repeat(-(-len(flat) // 1000))[: len(flat)])
            assert len(flat[:1000].unique()) > 900
            assert x.ne(drawn[name]).any()
    matrices = [x for name, x in repeated.items() if name.endswith("proj.weight")]
    assert len({x[0].numpy().tobytes() for x in matrices}) == len(matrices) == 21
    assert len(repeated["model.layers.0.self_attn.q_proj.bias"]) == 48


# Memory

MEASURE = """
import json, sys, threading, time
from pathlib import Path
from trtbuild.checkpoint.sources import make_checkpoint

def anonymous():
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.001)

small, large, out = sys.argv[1:]
make_checkpoint(json.loads(small), out + "-small")  # imports what there is to import
before = peak = anonymous()
done = threading.Event()
thread = threading.Thread(target=watch)
thread.start()
make_checkpoint(json.loads(large), out)
done.set()
thread.join()
print(peak - before)
"""


def big_qwen(folder: Path) -> Tensors:
    sizes = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 4, "vocab_size": 24576}
    config = QWEN | sizes | {"num_attention_heads": 16, "kv_channels": 128, "torch_dtype": "bfloat16"}
    tensors = qwen_tensors(config)
    write_published(folder, config, tensors, shards=4)
    return tensors


def big_baichuan(folder: Path) -> Tensors:
    """With the real vocabulary: as large a part of the head is normalized at once as of the real one."""
    sizes = {"hidden_size": 384, "intermediate_size": 49152, "num_hidden_layers": 4, "vocab_size": 125696}
    config = baichuan_config("v2_13b", **sizes, torch_dtype="bfloat16")
    tensors = baichuan_tensors(config)
    write_published(folder, config, tensors, shards=3)
    return tensors


def big_meta(folder: Path) -> Tensors:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 5, "vocab_size": 24576}
    tensors = llama_tensors(LLAMA | sizes | {"num_attention_heads": 16, "num_key_value_heads": 4})
    params = {"dim": 2048, "n_layers": 5, "n_heads": 16, "n_kv_heads": 4, "multiple_of": 256, "norm_eps": 1e-5}
    save_byte_tokenizer(write_meta(folder, params, tensors, world=4))
    return tensors


@pytest.fixture
def zeros(monkeypatch, tmp_path):
    """Models of bfloat16 zeros, which are made quickly; what was written is removed at once."""

    def make(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
        return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}

    monkeypatch.setattr("published_models.random_tensors", make)
    yield
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("write", "limit"), [(big_qwen, 0.25), (big_baichuan, 3), (big_meta, 2.3)])
def test_a_conversion_holds_hardly_more_than_one_tensor(write, limit, zeros, tmp_path):
    """So many times the largest, of a model of six times that; Qwen's are only cut, in pages that are the kernel's."""
    sizes = [x.nbytes for x in write(tmp_path / "large").values()]
    assert 90 << 20 < max(sizes) < 100 << 20
    assert sum(sizes) > 6 * max(sizes)
    kind = "v2_7b" if write is big_baichuan else "qwen"
    write_published(tmp_path / "small", config_of(kind), tensors_of(kind))
    small, large = source(kind, tmp_path / "small"), {"local": {"path": str(tmp_path / "large")}}
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(small), json.dumps(large), str(tmp_path / "out")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert int(result.stdout) < limit * max(sizes)


# Safety


def test_no_code_of_a_model_is_run():
    """The option of transformers that runs a repository's Python files is nowhere, not even to switch it off."""
    option = "_".join(("trust", "remote", "code"))
    folders = ("trtbuild", "rules", "workflow_scripts", "config", "tests", "profiles")
    files = [file for folder in folders for file in (REPOSITORY / folder).rglob("*") if file.is_file()]
    files = [file for file in files if file.suffix in (".py", ".smk", ".yaml", ".json", ".jinja", ".md", ".toml", "")]
    assert {REPOSITORY / "trtbuild/checkpoint/sources.py", Path(__file__), REPOSITORY / "rules/checkpoint.smk"} <= set(
        files
    )
    assert [file for file in files if option in file.read_text(errors="ignore")] == []
