"""The declared models against what was published of them, and the configurations of every family, good and bad."""

import math
import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from published_models import LLAMA, QWEN, baichuan_config

from trtbuild.errors import UserError
from trtbuild.models.config import ModelConfig, RopeConfig
from trtbuild.models.families import (
    FAMILIES,
    canonical_config,
    config_from_hugging_face,
    family_of,
    is_canonical,
)

REPOSITORY = Path(__file__).parent.parent.parent
MODELS = yaml.safe_load((REPOSITORY / "config" / "models.yaml").read_text())
SUPPORTED = "supported are " + ", ".join(
    f"{name} ({import_module(f'trtbuild.models.families.{name}').DESCRIPTION})" for name in FAMILIES
)


def refused(read, message: str) -> None:
    """It is refused with exactly this line."""
    with pytest.raises(UserError) as caught:
        read()
    assert str(caught.value) == message


# The declared models

PARAMETERS = {
    "smollm2-135m": 134515008,
    "llama-7b": 6738415616,
    "llama-13b": 13015864320,
    "llama-30b": 32528943616,
    "llama-65b": 65285660672,
    "llama2-7b": 6738415616,
    "llama2-7b-chat": 6738415616,
    "llama2-13b": 13015864320,
    "llama2-13b-chat": 13015864320,
    "llama2-70b": 68976648192,
    "llama2-70b-chat": 68976648192,
    "codellama-7b": 6738546688,
    "codellama-7b-instruct": 6738546688,
    "codellama-7b-python": 6738415616,
    "codellama-13b": 13016028160,
    "codellama-13b-instruct": 13016028160,
    "codellama-13b-python": 13015864320,
    "codellama-34b": 33743970304,
    "codellama-34b-instruct": 33743970304,
    "codellama-34b-python": 33743970304,
    "yi-6b": 6061035520,
    "yi-6b-chat": 6061035520,
    "yi-34b": 34388917248,
    "yi-34b-chat": 34388917248,
    "qwen1.8b": 1836828672,
    "qwen1.8b-chat": 1836828672,
    "qwen7b": 7721324544,
    "qwen7b-chat": 7721324544,
    "qwen14b": 14167290880,
    "qwen14b-chat": 14167290880,
    "qwen72b": 72287920128,
    "qwen72b-chat": 72287920128,
    "baichuan-v1_7b": 7000559616,
    "baichuan-v1_13b": 13264901120,
    "baichuan-v1_13b-chat": 13264901120,
    "baichuan-v2_7b": 7505973248,
    "baichuan-v2_7b-chat": 7505973248,
    "baichuan-v2_13b": 13896668160,
    "baichuan-v2_13b-chat": 13896668160,
}
# The longest start of a name counts: (RoPE base, or None for ALiBi; positions; epsilon).
POSITIONS = {
    "smollm2": (1e5, 8192, 1e-5),
    "llama": (1e4, 2048, 1e-6),
    "llama-65b": (1e4, 2048, 1e-5),
    "llama2": (1e4, 4096, 1e-5),
    "codellama": (1e6, 16384, 1e-5),
    "yi": (5e6, 4096, 1e-5),
    "qwen": (1e4, 8192, 1e-6),
    "qwen72b": (1e6, 32768, 1e-6),
    "baichuan-v1_7b": (1e4, 4096, 1e-6),
    "baichuan-v2_7b": (1e4, 4096, 1e-6),
    "baichuan-v1_13b": (None, 4096, 1e-6),
    "baichuan-v2_13b": (None, 4096, 1e-6),
}
TRAINED = {"qwen1.8b": 8192, "qwen7b": 8192, "qwen14b": 2048, "qwen72b": 0}  # NTK and log-n begin beyond; 0: neither
NO_COMMIT_KNOWN = {"codellama-7b-python", "codellama-13b-python"}
TEMPLATES = {file.stem for file in (REPOSITORY / "trtbuild" / "chat_templates").glob("*.jinja")}
declared = pytest.mark.parametrize("name", PARAMETERS)  # a user's own models are none of our business


def read(name: str) -> ModelConfig:
    return config_from_hugging_face(MODELS[name]["config"], name)


def published(name: str, table: dict):
    """A table's entry of the longest key that the name starts with."""
    return table[max((key for key in table if name.startswith(key)), key=len)]


def test_every_model_of_the_tables_is_declared():
    assert MODELS.keys() >= PARAMETERS.keys()


@declared
def test_number_of_parameters(name):
    assert sum(math.prod(shape) for shape in read(name).tensor_shapes().values()) == PARAMETERS[name]


@declared
def test_positions_and_epsilon(name):
    config = read(name)
    theta, length, eps = published(name, POSITIONS)
    assert (config.max_position_embeddings, config.rms_norm_eps) == (length, eps)
    if theta is None:
        assert config.rope is None
    elif name.startswith("qwen") and (trained := published(name, TRAINED)):
        assert config.rope == RopeConfig(theta=1e4, type="qwen", original_max_position_embeddings=trained)
    else:
        assert config.rope == RopeConfig(theta=theta, original_max_position_embeddings=length)


@declared
def test_biases_and_logn(name):
    """Qwen alone has them, and biases at q, k and v alone."""
    config, is_qwen = read(name), name.startswith("qwen")
    assert (config.attention_bias, config.attention_out_bias, config.mlp_bias) == (is_qwen, False, False)
    assert config.logn_length == (published(name, TRAINED) if is_qwen else 0)
    assert config.tie_word_embeddings == (name == "smollm2-135m")
    assert config.family == ("qwen" if is_qwen else "baichuan" if name.startswith("baichuan") else "llama")


@pytest.mark.parametrize(
    ("name", "heads", "kv_heads", "head_dim", "inner"),
    [
        ("llama2-70b", 64, 8, 128, 28672),
        ("codellama-34b", 64, 8, 128, 22016),
        ("yi-6b", 32, 4, 128, 11008),
        ("yi-34b", 56, 8, 128, 20480),
        ("llama-30b", 52, 52, 128, 17920),
        ("qwen1.8b", 16, 16, 128, 5504),  # half of what its configuration says
        ("qwen72b", 64, 64, 128, 24576),
        ("baichuan-v2_13b", 40, 40, 128, 13696),
    ],
)
def test_heads_and_width(name, heads, kv_heads, head_dim, inner):
    c = read(name)
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.intermediate_size) == (
        heads,
        kv_heads,
        head_dim,
        inner,
    )


@declared
def test_the_source_is_pinned(name):
    ((kind, source),) = MODELS[name]["source"].items()
    if name in NO_COMMIT_KNOWN:
        assert source["revision"] == "main"
    elif kind == "hub":
        assert re.fullmatch("[0-9a-f]{40}", source["revision"])
    else:
        assert (kind, source["version"], len(source["sha256"])) == ("pypi", "0.1.2", 64)


def test_no_two_models_are_one():
    sources = [str(model["source"]) for model in MODELS.values()]
    revisions = [
        s["revision"] for m in MODELS.values() for s in m["source"].values() if s.get("revision", "main") != "main"
    ]
    assert len(set(sources)) == len(sources) == 39
    assert len(set(revisions)) == len(revisions) == 36


@declared
def test_chat_template_is_one_that_there_is(name):
    expected = {
        "qwen": "qwen",
        "yi": "chatml",
        "llama2": "llama2",
        "baichuan-v1": "baichuan",
        "baichuan-v2": "baichuan2",
    }
    template = MODELS[name].get("chat_template")
    if name == "smollm2-135m":
        assert template is None  # its own
    elif name.endswith("-chat"):
        assert template == published(name, expected)
    elif name.endswith("-instruct"):
        assert template == "llama2"
    else:
        assert template == ("plain-bos" if read(name).family == "llama" and "yi" not in name else "plain")
    assert template in TEMPLATES | {None}


# Families


def test_the_families():
    assert FAMILIES == ("baichuan", "llama", "qwen")


@pytest.mark.parametrize(("model_type", "expected"), [("llama", "llama"), ("qwen", "qwen"), ("baichuan", "baichuan")])
def test_family_by_model_type(model_type, expected):
    assert family_of({"model_type": model_type}, "x").__name__ == f"trtbuild.models.families.{expected}"


@pytest.mark.parametrize("model_type", ["qwen2", "qwen2_moe", "qwen3", "qwen3_moe"])
def test_another_generation_is_named(model_type):
    refused(
        lambda: config_from_hugging_face(QWEN | {"model_type": model_type}, "d/config.json"),
        f"d/config.json: model_type {model_type.lower()!r} is another generation than the supported 'qwen'; "
        + SUPPORTED,
    )


@pytest.mark.parametrize("model_type", ["chatglm", "families", "", None, 5])
def test_an_unknown_family_is_named(model_type):
    refused(
        lambda: config_from_hugging_face(LLAMA | {"model_type": model_type}, "x"),
        f"x: model_type {model_type!r} is not supported; {SUPPORTED}",
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA, True),
        (QWEN, False),
        (baichuan_config("v1_7b"), False),
        (canonical_config(QWEN, "x"), True),
        (canonical_config(baichuan_config("v1_7b"), "x", "v1_7b"), True),
        (canonical_config(baichuan_config("v2_13b"), "x", "v2_13b"), True),
    ],
    ids=["llama", "qwen", "baichuan", "canonical qwen", "canonical baichuan 7b", "canonical baichuan 13b"],
)
def test_what_is_canonical(config, expected):
    assert is_canonical(config) == expected


def test_canonical_llama_is_the_published_one():
    assert canonical_config(LLAMA, "x") == LLAMA


def test_canonical_qwen():
    assert canonical_config(QWEN, "x") == {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "use_sliding_window": False,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "trtbuild": {"family": "qwen", "attention_out_bias": False, "ntk_length": 512, "logn_length": 512},
    }


@pytest.mark.parametrize(
    ("version", "architecture", "model_type", "extra", "extension"),
    [
        ("v1_7b", "LlamaForCausalLM", "llama", {"rope_theta": 10000.0}, {}),
        ("v2_7b", "LlamaForCausalLM", "llama", {"rope_theta": 10000.0}, {}),
        ("v1_13b", "BaichuanForCausalLM", "baichuan", {}, {"position_embedding": "alibi"}),
        ("v2_13b", "BaichuanForCausalLM", "baichuan", {}, {"position_embedding": "alibi"}),
    ],
)
def test_canonical_baichuan(version, architecture, model_type, extra, extension):
    assert (
        canonical_config(baichuan_config(version), "x", version)
        == {
            "architectures": [architecture],
            "model_type": model_type,
            "vocab_size": 320,
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "num_key_value_heads": 6,
            "hidden_act": "silu",
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "dtype": "float32",
            "trtbuild": {"family": "baichuan", "version": version} | extension,
        }
        | extra
    )


@pytest.mark.parametrize("config", [QWEN, baichuan_config("v1_7b"), baichuan_config("v2_13b")])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"torch_dtype": "float16"}, "float16"),
        ({"torch_dtype": "float16", "dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": None}, "bfloat16"),
    ],
)
def test_dtype(config, given, expected):
    config = config | {"vocab_size": 64000} | given
    assert canonical_config(config, "x")["dtype"] == expected


@pytest.mark.parametrize(
    ("change", "rope", "logn", "length"),
    [
        ({}, RopeConfig(1e4, "qwen", original_max_position_embeddings=512), 512, 512),
        ({"seq_length": 128}, RopeConfig(1e4, "qwen", original_max_position_embeddings=128), 128, 512),
        ({"seq_length": 2048}, RopeConfig(1e4, "qwen", original_max_position_embeddings=2048), 2048, 2048),
        ({"use_dynamic_ntk": False}, RopeConfig(1e4, original_max_position_embeddings=512), 512, 512),
        ({"use_logn_attn": False}, RopeConfig(1e4, "qwen", original_max_position_embeddings=512), 0, 512),
        ({"rotary_emb_base": 1000000}, RopeConfig(1e6, "qwen", original_max_position_embeddings=512), 512, 512),
    ],
)
def test_qwen_positions(change, rope, logn, length):
    config = config_from_hugging_face(QWEN | change, "x")
    assert (config.rope, config.logn_length, config.max_position_embeddings) == (rope, logn, length)


# Configurations that are wrong

SIZE = "an integer from 1 to 16777216 is expected"

REQUIRED = {
    "llama": [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
    "qwen": [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "kv_channels",
        "layer_norm_epsilon",
        "max_position_embeddings",
        "seq_length",
        "rotary_emb_base",
        "use_dynamic_ntk",
        "use_logn_attn",
    ],
    "v1_7b": [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
    ],
}
REQUIRED["v2_13b"] = [*REQUIRED["v1_7b"], "model_max_length"]
CONFIGS = {"llama": LLAMA, "qwen": QWEN} | {
    version: baichuan_config(version, vocab_size=size) for version, size in (("v1_7b", 64000), ("v2_13b", 125696))
}


@pytest.mark.parametrize(("kind", "key"), [(kind, key) for kind, keys in REQUIRED.items() for key in keys])
def test_a_missing_key_is_named(kind, key):
    rest = {name: value for name, value in CONFIGS[kind].items() if name != key}
    refused(lambda: config_from_hugging_face(rest, "d/config.json"), f"d/config.json: the key '{key}' is missing")


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("llama", {"num_attention_heads": 0}, f"num_attention_heads has the wrong type or value: 0; {SIZE}"),
        ("llama", {"rope_theta": "big"}, "rope_theta has the wrong type or value: 'big'; a number above 0 is expected"),
        (
            "qwen",
            {"rotary_emb_base": "big"},
            "rotary_emb_base has the wrong type or value: 'big'; a number above 0 is expected",
        ),
        ("qwen", {"kv_channels": None}, "the key 'kv_channels' is missing"),
        ("v1_7b", {"num_attention_heads": [6]}, f"num_attention_heads has the wrong type or value: [6]; {SIZE}"),
        ("v1_7b", {"hidden_act": None}, "hidden_act None is not supported; SwiGLU models use 'silu'"),
        ("v2_13b", {"model_max_length": "many"}, f"model_max_length has the wrong type or value: 'many'; {SIZE}"),
    ],
)
def test_a_value_of_another_type_is_refused(kind, change, reason):
    refused(lambda: config_from_hugging_face(CONFIGS[kind] | change, "x"), f"x: {reason}")


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        *(
            ("qwen", {key: value}, f"x: {key} has the wrong type or value: {value!r}; use an integer above 1")
            for key, value in (("intermediate_size", 1), ("seq_length", 1))
        ),
        ("qwen", {"intermediate_size": 161}, "x: intermediate_size 161 is odd; Qwen's counts w1 and w2"),
        (
            "v2_13b",
            {"tie_word_embeddings": True},
            "x: tie_word_embeddings is true; Baichuan's models have their own head",
        ),
        (
            "v1_7b",
            {"num_key_value_heads": 2},
            "x: num_key_value_heads is not 6, the heads that W_pack has",
        ),
        ("llama", {"hidden_size": 50}, "x: hidden_size 50 is not a multiple of the 6 heads"),
        ("llama", {"num_key_value_heads": 4}, "x: num_attention_heads 6 is not a multiple of num_key_value_heads 4"),
        ("qwen", {"kv_channels": 8}, "x: kv_channels 8 times 3 heads is not hidden_size 48"),
        ("qwen", {"rotary_pct": 0.5}, "x: rotary_pct 0.5 is not supported; Qwen's models have 1.0"),
        ("qwen", {"no_bias": False}, "x: no_bias False is not supported; Qwen's models have True"),
        (
            "qwen",
            {"scale_attn_weights": False},
            "x: scale_attn_weights False is not supported; Qwen's models have True",
        ),
        ("v1_7b", {"hidden_size": 50}, "x: hidden_size 50 is not a multiple of the 6 heads"),
        ("v2_13b", {"hidden_act": "gelu"}, "x: hidden_act 'gelu' is not supported; SwiGLU models use 'silu'"),
    ],
)
def test_a_contradiction_is_named(kind, change, message):
    refused(lambda: config_from_hugging_face(CONFIGS[kind] | change, "x"), message)


# Versions of Baichuan

VERSIONS = {"v1_7b": 64000, "v1_13b": 64000, "v2_7b": 125696, "v2_13b": 125696}
ALL = "v1_7b, v1_13b, v2_7b, v2_13b"


@pytest.mark.parametrize(("version", "size"), VERSIONS.items())
@pytest.mark.parametrize("given", [False, True])
def test_baichuan_is_recognized(version, size, given):
    config = baichuan_config(version, vocab_size=size)
    canonical = canonical_config(config, "x", version if given else None)
    assert canonical["trtbuild"]["version"] == version
    assert (ModelConfig.from_canonical(canonical, "x").rope is None) == version.endswith("13b")


def test_baichuan2_7b_has_both_lengths():
    """Its configuration says `model_max_length` as well; `max_position_embeddings` is what RoPE knows."""
    config = baichuan_config("v2_7b", vocab_size=125696, model_max_length=4096)
    canonical = canonical_config(config, "x")
    assert (canonical["trtbuild"]["version"], canonical["max_position_embeddings"]) == ("v2_7b", 512)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_baichuan_of_another_vocabulary_needs_its_version(version):
    config = baichuan_config(version)
    assert canonical_config(config, "x", version)["trtbuild"]["version"] == version
    refused(
        lambda: canonical_config(config, "x"),
        f"x: a Baichuan of 320 words may be of either generation; give model_version, one of {ALL}",
    )


@pytest.mark.parametrize(("version", "size"), VERSIONS.items())
def test_a_version_that_the_configuration_contradicts(version, size):
    config = baichuan_config(version, vocab_size=size)
    for other in VERSIONS.keys() - {version}:
        refused(
            lambda other=other: canonical_config(config, "x", other),
            f"x: model_version is given as {other}, but this is {version}",
        )


@pytest.mark.parametrize(("given", "found"), [("v1_13b", "v1_7b"), ("v2_13b", "v2_7b")])
def test_a_size_that_the_configuration_contradicts(given, found):
    """Also where the vocabulary does not tell the generation."""
    refused(
        lambda: canonical_config(baichuan_config(found), "x", given),
        f"x: model_version is given as {given}, but this is {found}",
    )


@pytest.mark.parametrize("given", ["v3_7b", "7b", "v1", "V1_7B", "v1_7b "])
@pytest.mark.parametrize("size", [320, 64000])
def test_a_version_that_baichuan_does_not_have(given, size):
    refused(
        lambda: canonical_config(baichuan_config("v1_7b", vocab_size=size), "x", given),
        f"x: Baichuan and Baichuan2 has no model_version {given!r}; it has {ALL}",
    )


@pytest.mark.parametrize(
    ("config", "description"),
    [(LLAMA, "LLaMA, CodeLlama, Yi"), (QWEN, "the first Qwen, QWenLMHeadModel")],
    ids=["llama", "qwen"],
)
def test_other_families_have_no_versions(config, description):
    refused(
        lambda: canonical_config(config, "x", "v1_7b"),
        f"x: {description} has no model_version 'v1_7b'; it has no versions, leave it out",
    )
