"""LLaMA in Meta's own shards: joined bit by bit, against Meta's network, and shards that are not of one model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from published_models import LLAMA, META, Tensors, llama_tensors, write_meta
from reference_models import attend, rms_norm
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.dummy import save_byte_tokenizer
from trtbuild.checkpoint.meta import is_meta, read_meta
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.errors import UserError
from trtbuild.models.families import llama

# world, dim, n_heads, n_kv_heads, multiple_of, vocabulary, width of the FFN: int(8 dim / 3), rounded up
SHARDS = {
    "1 shard": (1, 48, 6, 2, 16, 320, 128),
    "2 shards, 2 KV heads": (2, 48, 6, 2, 16, 320, 128),
    "2 shards": (2, 48, 6, None, 16, 320, 128),
    "3 shards, 3 KV heads": (3, 48, 6, 3, 24, 321, 144),
    "4 shards, 4 KV heads": (4, 64, 8, 4, 16, 320, 176),
    "8 shards": (8, 64, 8, 8, 16, 320, 176),
    "8 shards, 8 KV heads": (8, 128, 16, 8, 32, 320, 352),
}
shards = pytest.mark.parametrize("case", SHARDS.values(), ids=SHARDS.keys())


def published(
    folder: Path, case=SHARDS["2 shards, 2 KV heads"], dtype=torch.float32, **changes
) -> tuple[dict, Tensors]:
    """Writes Meta's folder, and returns its parameters and its tensors as Hugging Face has them."""
    world, dim, heads, kv_heads, multiple, vocabulary, inner = case
    params = META | {"dim": dim, "n_heads": heads, "n_kv_heads": kv_heads, "multiple_of": multiple} | changes
    if kv_heads is None:
        del params["n_kv_heads"]  # as in the first LLaMA
    config = LLAMA | {
        "hidden_size": dim,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads or heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    }
    tensors = {name: x.to(dtype) for name, x in llama_tensors(config).items()}
    save_byte_tokenizer(write_meta(folder, params, tensors, world))
    return params, tensors


def convert(source: Path, out: Path) -> Tensors:
    make_checkpoint({"local": {"path": str(source)}}, out)
    Checkpoint(out)
    return load_file(out / "model.safetensors")


def ranks_of(folder: Path) -> list[Tensors]:
    return [torch.load(file) for file in sorted(folder.glob("*.pth"))]


def shard(folder: Path, rank: int) -> Path:
    return folder / f"consolidated.{rank:02d}.pth"


def change(folder: Path, *ranks: int, remove: str | None = None, **add: torch.Tensor) -> None:
    for rank in ranks:
        tensors = torch.load(shard(folder, rank)) | {name.replace("__", "."): x for name, x in add.items()}
        tensors.pop(remove, None)
        torch.save(tensors, shard(folder, rank))


def refused(folder: Path, message: str) -> None:
    """The folder is refused as a source with exactly this line, and nothing is left beside it."""
    with pytest.raises(UserError) as caught:
        make_checkpoint({"local": {"path": str(folder)}}, folder.parent / "out")
    assert str(caught.value) == message
    assert list(folder.parent.iterdir()) == [folder]


# Conversion


@shards
def test_tensors_are_joined_bit_by_bit(case, tmp_path):
    """`write_meta` splits each tensor along the dimension of Meta's parallel layers."""
    _, tensors = published(tmp_path / "meta", case)
    converted = convert(tmp_path / "meta", tmp_path / "out")
    assert converted.keys() == tensors.keys()
    for name, x in tensors.items():
        assert converted[name].equal(x), name


@pytest.mark.parametrize(
    ("theirs", "ours", "dim"),
    [
        ("tok_embeddings", "model.embed_tokens", 1),
        ("layers.1.attention.wv", "model.layers.1.self_attn.v_proj", 0),
        ("layers.1.attention.wo", "model.layers.1.self_attn.o_proj", 1),
        ("layers.1.feed_forward.w1", "model.layers.1.mlp.gate_proj", 0),
        ("layers.1.feed_forward.w2", "model.layers.1.mlp.down_proj", 1),
        ("layers.1.feed_forward.w3", "model.layers.1.mlp.up_proj", 0),
        ("output", "lm_head", 0),
    ],
)
def test_dimension_along_which_a_tensor_is_joined(tmp_path, theirs, ours, dim):
    published(tmp_path / "meta", SHARDS["4 shards, 4 KV heads"])
    converted = convert(tmp_path / "meta", tmp_path / "out")
    parts = [rank[f"{theirs}.weight"] for rank in ranks_of(tmp_path / "meta")]
    assert converted[f"{ours}.weight"].equal(torch.cat(parts, dim))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("norm", "model.norm"),
        ("layers.2.attention_norm", "model.layers.2.input_layernorm"),
        ("layers.2.ffn_norm", "model.layers.2.post_attention_layernorm"),
    ],
)
def test_norms_are_the_same_in_every_shard(tmp_path, theirs, ours):
    published(tmp_path / "meta", SHARDS["4 shards, 4 KV heads"])
    converted = convert(tmp_path / "meta", tmp_path / "out")
    for rank in ranks_of(tmp_path / "meta"):
        assert converted[f"{ours}.weight"].equal(rank[f"{theirs}.weight"])


def test_rotary_pairs_become_halves(tmp_path):
    """Meta rotates rows 2i and 2i + 1 of a head together; here they are rows i and i + head_dim / 2."""
    published(tmp_path / "meta", SHARDS["1 shard"])
    converted = convert(tmp_path / "meta", tmp_path / "out")
    (rank,) = ranks_of(tmp_path / "meta")
    for theirs, ours, heads in (("wq", "q_proj", 6), ("wk", "k_proj", 2)):
        old, new = rank[f"layers.0.attention.{theirs}.weight"], converted[f"model.layers.0.self_attn.{ours}.weight"]
        for head in range(heads):
            for i in range(4):
                assert new[8 * head + i].equal(old[8 * head + 2 * i])
                assert new[8 * head + 4 + i].equal(old[8 * head + 2 * i + 1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_is_kept(tmp_path, dtype):
    _, tensors = published(tmp_path / "meta", dtype=dtype)
    converted = convert(tmp_path / "meta", tmp_path / "out")
    assert all(converted[name].equal(x) for name, x in tensors.items())
    assert {x.dtype for x in converted.values()} == {dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


def test_configuration(tmp_path):
    published(tmp_path / "meta")
    convert(tmp_path / "meta", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "float32",
    }


PARAMS = {
    "7B": ({"dim": 4096, "n_heads": 32, "n_layers": 32, "multiple_of": 256}, 1, 32000),
    "30B": ({"dim": 6656, "n_heads": 52, "n_layers": 60, "multiple_of": 256}, 4, 32000),
    "70B": (
        {"dim": 8192, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80, "multiple_of": 4096, "ffn_dim_multiplier": 1.3},
        8,
        32000,
    ),
    "CodeLlama 7B": (
        {
            "dim": 4096,
            "n_heads": 32,
            "n_layers": 32,
            "multiple_of": 256,
            "ffn_dim_multiplier": 1.0,
            "rope_theta": 1000000,
        },
        1,
        32016,
    ),
    "CodeLlama 34B": (
        {
            "dim": 8192,
            "n_heads": 64,
            "n_kv_heads": 8,
            "n_layers": 48,
            "multiple_of": 256,
            "ffn_dim_multiplier": 1.0,
            "rope_theta": 1000000,
        },
        4,
        32000,
    ),
}


@pytest.mark.parametrize(
    ("name", "inner", "kv_heads", "theta", "length"),
    [
        ("7B", 11008, 32, 1e4, 4096),
        ("30B", 17920, 52, 1e4, 4096),
        ("70B", 28672, 8, 1e4, 4096),
        ("CodeLlama 7B", 11008, 32, 1e6, 16384),
        ("CodeLlama 34B", 22016, 8, 1e6, 16384),
    ],
)
def test_published_parameters(tmp_path, name, inner, kv_heads, theta, length):
    """The width that the FFN has, and the vocabulary, which is -1 in the files: from tensors of the real shapes."""
    params, world, vocabulary = PARAMS[name]
    (tmp_path / "params.json").write_text(json.dumps(params | {"norm_eps": 1e-5, "vocab_size": -1}))
    dim = params["dim"]
    for rank in range(world):
        tensors = {"output": (vocabulary // world, dim), "layers.0.attention.wq": (dim // world, dim)}
        one = torch.ones(1, dtype=torch.bfloat16)  # takes the place of them all
        torch.save({f"{tensor}.weight": one.expand(shape) for tensor, shape in tensors.items()}, shard(tmp_path, rank))
    config, tensors = read_meta(tmp_path)
    assert (config["intermediate_size"], config["num_key_value_heads"]) == (inner, kv_heads)
    assert (config["rope_theta"], config["max_position_embeddings"]) == (theta, length)
    assert (config["vocab_size"], config["dtype"]) == (vocabulary, "bfloat16")
    assert {tensor: x.shape for tensor, x in tensors.items()} == {
        "lm_head.weight": (vocabulary, dim),
        "model.layers.0.self_attn.q_proj.weight": (dim, dim),
    }


# The network


def meta_logits(params: dict, ranks: list[Tensors], ids: list[int]) -> torch.Tensor:
    """`[tokens, vocab]` of Meta's own model, rank by rank as its parallel layers compute it, in float64."""
    ranks = [{name: x.double() for name, x in rank.items()} for rank in ranks]
    head_dim = params["dim"] // params["n_heads"]
    group = params["n_heads"] // (params.get("n_kv_heads") or params["n_heads"])
    frequencies = params.get("rope_theta", 1e4) ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(len(ids), dtype=torch.float64)[:, None] * frequencies
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotate(x):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    x = torch.cat([rank["tok_embeddings.weight"][ids] for rank in ranks], -1)
    for i in range(params["n_layers"]):
        names = {name: f"layers.{i}.attention.w{name}.weight" for name in "qkvo"}
        h = rms_norm(x, ranks[0][f"layers.{i}.attention_norm.weight"], params["norm_eps"])
        for rank in ranks:
            q, k, v = ((h @ rank[names[name]].T).unflatten(-1, (-1, head_dim)) for name in "qkv")
            k, v = (y.repeat_interleave(group, 1) for y in (rotate(k), v))
            x = x + attend(rotate(q), k, v) @ rank[names["o"]].T
        h = rms_norm(x, ranks[0][f"layers.{i}.ffn_norm.weight"], params["norm_eps"])
        for rank in ranks:
            w1, w2, w3 = (rank[f"layers.{i}.feed_forward.w{n}.weight"] for n in (1, 2, 3))
            x = x + (torch.nn.functional.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
    h = rms_norm(x, ranks[0]["norm.weight"], params["norm_eps"])
    return torch.cat([h @ rank["output.weight"].T for rank in ranks], -1)


@pytest.mark.parametrize("changes", [{}, {"rope_theta": 1000000.0}], ids=["base 1e4", "base 1e6"])
@pytest.mark.parametrize("case", [SHARDS["1 shard"], SHARDS["3 shards, 3 KV heads"], SHARDS["8 shards, 8 KV heads"]])
@torch.inference_mode()
def test_transformers_computes_what_metas_model_does(case, changes, tmp_path):
    params, _ = published(tmp_path / "meta", case, **changes)
    convert(tmp_path / "meta", tmp_path / "out")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    for tokens in (1, 7, 300):
        ids = torch.randint(320, (tokens,), generator=generator)
        expected = meta_logits(params, ranks_of(tmp_path / "meta"), ids.tolist())
        error = (model(ids[None]).logits[0].double() - expected).norm() / expected.norm()
        assert error < 1e-5


# Files


def test_what_is_metas(tmp_path):
    published(tmp_path / "x")
    assert is_meta(tmp_path / "x")
    (tmp_path / "x" / "config.json").write_text("{}")  # some repositories have both
    assert not is_meta(tmp_path / "x")


@pytest.mark.parametrize("place", ["beside the shards", "beside the folder"])
def test_tokenizer_model(tmp_path, monkeypatch, place):
    """Meta's download has one `tokenizer.model` for all its folders."""
    source = tmp_path / "llama" / "7B"
    published(source)
    for file in source.glob("tokenizer*"):
        file.unlink()
    if place == "beside the shards":
        expected = source / "tokenizer.model"
        (source.parent / "tokenizer.model").write_text("of another model")
    else:
        expected = source.parent / "tokenizer.model"
    expected.write_text("this one")
    asked = []

    def save_tokenizer(file: Path, folder: Path, config: dict) -> None:
        asked.append(file)
        save_byte_tokenizer(folder)

    monkeypatch.setattr(llama, "save_tokenizer", save_tokenizer)
    convert(source, tmp_path / "out")
    assert asked == [expected]


def test_no_tokenizer(tmp_path):
    folder = tmp_path / "meta"
    published(folder)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    refused(folder, f"{folder} has neither tokenizer.json nor tokenizer.model; fetch its tokenizer")


# What is wrong


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_shard_is_missing(tmp_path, missing):
    folder = tmp_path / "meta"
    published(folder, SHARDS["4 shards, 4 KV heads"])
    shard(folder, missing).unlink()
    refused(folder, f"{folder}: the shard consolidated.0{missing}.pth is missing; download it")


@pytest.mark.parametrize(
    ("there", "missing"),
    [
        (3, "consolidated.03.pth"),
        (2, "consolidated.02.pth, consolidated.03.pth"),
        (1, "consolidated.01.pth, consolidated.02.pth, consolidated.03.pth"),
    ],
)
def test_the_last_shards_are_missing(tmp_path, there, missing):
    """No gap in the numbers tells it, but the size of a share does."""
    folder = tmp_path / "meta"
    published(folder, SHARDS["4 shards, 4 KV heads"])
    for rank in range(there, 4):
        shard(folder, rank).unlink()
    refused(folder, f"{folder}: {there} of 4 shards are there; missing: {missing}")


def test_no_shard(tmp_path):
    folder = tmp_path / "meta"
    published(folder)
    for rank in (0, 1):
        shard(folder, rank).unlink()
    refused(folder, f"{folder} has params.json but no consolidated.00.pth; download the weights into it")


def test_a_shard_too_many(tmp_path):
    folder = tmp_path / "meta"
    published(folder)
    shutil.copy(shard(folder, 1), shard(folder, 2))
    refused(
        folder,
        f"{folder}: tensor model.embed_tokens.weight has shape (320, 72), config.json asks for (480, 48)",
    )


@pytest.mark.parametrize("owner", [0, 1])
def test_shards_with_different_tensors(tmp_path, owner):
    folder, other = tmp_path / "meta", 1 - owner
    published(folder)
    change(folder, owner, foo=torch.ones(2))
    message = f"{shard(folder, owner)} holds the tensor foo, {shard(folder, other).name} does not"
    refused(folder, f"{message}; the shards are not of one model")


def test_a_shard_lacks_a_tensor(tmp_path):
    folder = tmp_path / "meta"
    published(folder)
    change(folder, 1, remove="norm.weight")
    message = f"{shard(folder, 0)} holds the tensor norm.weight, consolidated.01.pth does not"
    refused(folder, f"{message}; the shards are not of one model")


def test_a_shard_of_a_model_of_another_width(tmp_path):
    folder = tmp_path / "meta"
    published(folder)
    change(folder, 1, layers__0__feed_forward__w1__weight=torch.ones(40, 48))
    refused(
        folder,
        f"{folder}/consolidated.01.pth holds another layers.0.feed_forward.w1.weight than consolidated.00.pth; "
        "the shards are not of one model",
    )


@pytest.mark.parametrize("value", [torch.ones(48), torch.ones(40), torch.ones(48).half()], ids=str)
def test_shards_whose_norms_differ(tmp_path, value):
    folder = tmp_path / "meta"
    published(folder)
    change(folder, 1, norm__weight=value)
    refused(
        folder,
        f"{folder}/consolidated.01.pth holds another norm.weight than consolidated.00.pth; "
        "the shards are not of one model",
    )


@pytest.mark.parametrize(
    "name", ["foo", "layers.0.attention.wz.weight", "layers.0.attention.wq.bias", "rope.freqs.weight"]
)
def test_a_tensor_that_is_not_llamas(tmp_path, name):
    folder = tmp_path / "meta"
    published(folder)
    change(folder, 0, 1, **{name.replace(".", "__"): torch.ones(2)})
    refused(folder, f"{shard(folder, 0)}: the tensor {name} is not part of a LLaMA model")


def test_a_layer_too_many(tmp_path):
    folder = tmp_path / "meta"
    published(folder)
    change(folder, 0, 1, layers__3__attention__wv__weight=torch.ones(8, 48))
    name = "model.layers.3.self_attn.v_proj.weight"
    refused(folder, f"{folder}: the tensor {name} is no part of the model that config.json describes")


@pytest.mark.parametrize(
    ("missing", "name", "shape"),
    [
        ("norm.weight", "model.norm.weight", (48,)),
        ("layers.1.attention.wk.weight", "model.layers.1.self_attn.k_proj.weight", (16, 48)),
        ("tok_embeddings.weight", "model.embed_tokens.weight", (320, 48)),
    ],
)
def test_a_tensor_is_in_no_shard(tmp_path, missing, name, shape):
    folder = tmp_path / "meta"
    published(folder)
    change(folder, 0, 1, remove=missing)
    refused(folder, f"{folder}: tensor {name} is missing; config.json asks for it with shape {shape}")


def test_a_shard_of_objects(tmp_path):
    folder = tmp_path / "meta"
    published(folder)
    torch.save({"x": torch.nn.Linear(1, 1)}, shard(folder, 1))
    name = "torch.nn.modules.linear.Linear"
    reason = f"Unsupported global: GLOBAL {name} was not an allowed global by default"
    refused(folder, f"{shard(folder, 1)} holds more than tensors, and is not read: {reason}")


@pytest.mark.parametrize("key", ["dim", "n_layers", "n_heads", "multiple_of", "norm_eps"])
def test_a_parameter_is_missing(tmp_path, key):
    folder = tmp_path / "meta"
    params, _ = published(folder)
    (folder / "params.json").write_text(json.dumps({name: x for name, x in params.items() if name != key}))
    refused(folder, f"{folder}: params.json or the shards are not LLaMA's ('{key}' is missing or wrong)")


def test_the_output_is_missing(tmp_path):
    folder = tmp_path / "meta"
    published(folder)
    change(folder, 0, 1, remove="output.weight")
    refused(folder, f"{folder}: params.json or the shards are not LLaMA's ('output.weight' is missing or wrong)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "{} is not valid JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("[]", "{} holds a JSON list; an object is expected"),
    ],
)
def test_parameters_are_not_json(tmp_path, content, message):
    folder = tmp_path / "meta"
    published(folder)
    (folder / "params.json").write_text(content)
    refused(folder, message.format(folder / "params.json"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"n_layers": 4},
            "{}: tensor model.layers.3.input_layernorm.weight is missing; config.json asks for it with shape (48,)",
        ),
        (
            {"multiple_of": 40},
            "{}: tensor model.layers.0.mlp.gate_proj.weight has shape (128, 48), config.json asks for (160, 48)",
        ),
        (
            {"n_kv_heads": None},
            "{}: tensor model.layers.0.self_attn.k_proj.weight has shape (16, 48), config.json asks for (48, 48)",
        ),
        ({"n_kv_heads": 4}, "{}/config.json: num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ({"n_heads": 10}, "{}/config.json: hidden_size 48 is not a multiple of the 10 heads"),
        (
            {"dim": "48"},
            "{}/params.json: dim is '48'; a positive integer is expected",
        ),
        (
            {"use_scaled_rope": True},
            "{}/params.json: use_scaled_rope (True) is not known, and may change results; use the model's Hugging Face "
            "folder",
        ),
    ],
    ids=["layers", "width", "KV heads", "groups", "heads", "dim", "RoPE"],
)
def test_parameters_that_contradict_the_shards(tmp_path, changes, message):
    folder = tmp_path / "meta"
    params, _ = published(folder)
    (folder / "params.json").write_text(json.dumps(params | changes))
    refused(folder, message.format(folder))


@pytest.mark.parametrize("fault", ["no wq", "n_layers", "multiple_of", "rope_theta", "ffn_dim_multiplier"])
def test_faults_are_named(tmp_path, fault):
    folder = tmp_path / "meta"
    params, _ = published(folder)
    wrong = {"n_layers": "3", "multiple_of": 0, "rope_theta": "big", "ffn_dim_multiplier": "x"}
    if fault == "no wq":
        change(folder, 0, 1, remove="layers.0.attention.wq.weight")
    else:
        (folder / "params.json").write_text(json.dumps(params | {fault: wrong[fault]}))
    with pytest.raises(UserError, match=str(folder)):
        make_checkpoint({"local": {"path": str(folder)}}, tmp_path / "out")


def test_other_files_are_left_alone(tmp_path):
    folder = tmp_path / "meta"
    published(folder)
    shutil.copy(shard(folder, 0), folder / "consolidated.00-old.pth")
    config, tensors = read_meta(folder)
    assert len(tensors) == 3 + 9 * config["num_hidden_layers"]
