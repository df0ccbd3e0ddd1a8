"""LLaMA configurations and random LLaMA models, against transformers' own configuration, RoPE and model."""

import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import decoder
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.errors import UserError
from trtbuild.models.config import RopeConfig
from trtbuild.models.families import config_from_hugging_face
from trtbuild.runtime.session import PortableSession

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
}
scalings = pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())


# Configuration


def test_sizes_and_options(tiny_config):
    config = config_from_hugging_face(
        tiny_config | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, "x"
    )
    sizes = {key: tiny_config[key] for key in dataclasses.asdict(config) if key in tiny_config}
    assert sizes | {"tie_word_embeddings": True} == {key: getattr(config, key) for key in sizes}
    assert len(sizes) == 10
    assert config.attention_bias
    assert config.attention_out_bias
    assert config.mlp_bias


def test_defaults_of_optional_keys(tiny_config):
    optional = ("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_theta", "tie_word_embeddings")
    given = {key: value for key, value in tiny_config.items() if key not in optional}
    config, theirs = config_from_hugging_face(given, "x"), LlamaConfig(**given)
    assert config.num_key_value_heads == theirs.num_key_value_heads == 4
    assert config.head_dim == theirs.head_dim == 16
    assert config.rms_norm_eps == theirs.rms_norm_eps == 1e-6
    assert config.rope.theta == theirs.rope_parameters["rope_theta"] == 10000.0
    assert (config.tie_word_embeddings, config.attention_bias, config.mlp_bias) == (False, False, False)


@scalings
def test_both_spellings_of_rope(tiny_config, scaling):
    """`rope_theta` and `rope_scaling` (with `rope_type` or, older, `type`) mean the same as `rope_parameters`."""
    new = {k: v for k, v in tiny_config.items() if k != "rope_theta"} | {
        "rope_parameters": scaling | {"rope_theta": 5e5}
    }
    old = tiny_config | {"rope_theta": 5e5, "rope_scaling": scaling}
    oldest = old | {"rope_scaling": {"type" if k == "rope_type" else k: v for k, v in scaling.items()}}
    read = [config_from_hugging_face(config, "x").rope for config in (new, old, oldest)]
    assert read[0] == read[1] == read[2]
    assert read[0].theta == 5e5
    assert (read[0].type, read[0].factor) == (scaling["rope_type"], scaling.get("factor", 1.0))
    assert read[0].original_max_position_embeddings == (64 if scaling is LLAMA3 else 256)


@scalings
def test_of_both_spellings_the_old_one_counts(tiny_config, scaling):
    config = tiny_config | {"rope_scaling": scaling, "rope_parameters": {"rope_type": "linear", "factor": 3.0}}
    rope = config_from_hugging_face(config, "x").rope
    theirs = LlamaConfig(**config).rope_parameters
    assert (rope.type, rope.factor, rope.theta) == (
        theirs["rope_type"],
        theirs.get("factor", 1.0),
        theirs["rope_theta"],
    )


@pytest.mark.parametrize("rope_scaling", [None, {}])
def test_no_rope_scaling(tiny_config, rope_scaling):
    assert config_from_hugging_face(tiny_config | {"rope_scaling": rope_scaling}, "x").rope == RopeConfig(
        original_max_position_embeddings=256
    )


@pytest.mark.parametrize(
    "key",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_a_missing_key_is_named(tiny_config, key):
    rest = {name: value for name, value in tiny_config.items() if name != key}
    with pytest.raises(UserError, match=f"model/config.json: the key '{key}' is missing"):
        config_from_hugging_face(rest, "model/config.json")


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3"])
def test_a_scaling_without_its_factor_is_refused(tiny_config, kind):
    """transformers refuses it too; a factor of 1 would be another model."""
    with pytest.raises(UserError, match="the key 'factor' is missing"):
        config_from_hugging_face(tiny_config | {"rope_scaling": {"rope_type": kind}}, "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "x: model_type 'gpt2' is not supported; supported are baichuan"),
        ({"model_type": None}, "x: model_type None is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "x: RoPE scaling 'yarn'.*default, linear, dynamic"),
        ({"num_attention_heads": 5}, "x: num_attention_heads 5 is not a multiple of num_key_value_heads 2"),
        ({"hidden_act": "gelu"}, "x: hidden_act 'gelu' is not supported; SwiGLU models use 'silu'"),
    ],
    ids=["model_type", "no model_type", "rope", "heads", "hidden_act"],
)
def test_what_is_not_supported_is_named(tiny_config, change, message):
    with pytest.raises(UserError, match=message):
        config_from_hugging_face(tiny_config | change, "x")


def test_a_rank_outside_the_world_is_refused():
    with pytest.raises(UserError, match="rank 1 is outside a world of 1"):
        Mapping(rank=1)


@scalings
@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
def test_inverse_frequencies(scaling, theta, head_dim):
    """Equal to transformers' own to float32 rounding; `dynamic` ones are those within the limit."""
    parameters = scaling | {"rope_theta": theta}
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(head_dim=head_dim, max_position_embeddings=256, rope_parameters=parameters)
    )
    config = RopeConfig.from_hugging_face({"rope_parameters": parameters, "max_position_embeddings": 256}, "x")
    assert theirs.attention_scaling == 1.0
    torch.testing.assert_close(config.inverse_frequencies(head_dim), theirs.inv_freq, rtol=1e-6, atol=0)


# Models

TOLERANCE = 2e-4  # norm of the difference over the norm of transformers' logits, float32
LIMITS = BuildLimits(max_batch_size=3, max_input_len=100, max_output_len=6)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 96,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
MODELS = {
    "groups of 3": {},
    "groups of 2, biases": {"num_key_value_heads": 3, "attention_bias": True, "mlp_bias": True},
    "no groups, tied": {"num_key_value_heads": 6, "tie_word_embeddings": True},
    "one group, wide heads": {"num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-3},
    "linear": {"rope_parameters": SCALINGS["linear"] | {"rope_theta": 1e4}},
    "dynamic": {"rope_parameters": SCALINGS["dynamic"] | {"rope_theta": 1e4}},
    "llama3": {"rope_parameters": SCALINGS["llama3"] | {"rope_theta": 5e5}},
    "dynamic beyond the limit": {
        "rope_parameters": SCALINGS["dynamic"] | {"rope_theta": 1e4},
        "max_position_embeddings": 32,
    },
    # transformers knows only the model's own limit for `dynamic`
    "dynamic with another original limit": {
        "rope_parameters": SCALINGS["dynamic"] | {"rope_theta": 1e4, "original_max_position_embeddings": 16},
        "max_position_embeddings": 32,
    },
}


def random_llama(options: dict) -> LlamaForCausalLM:
    """Weights that make every part matter: unit-scale activations, norms away from 1, biases away from 0."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES | options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            else:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model


def session_of(folder) -> PortableSession:
    checkpoint = Checkpoint(folder)
    network = decoder(checkpoint.config, checkpoint.__getitem__, torch.float32, LIMITS.max_length)
    return PortableSession(PortableEngine(network, LIMITS, torch.device("cpu")))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("options", MODELS.values(), ids=MODELS.keys())
@torch.inference_mode()
def test_logits_equal_transformers(options, tmp_path):
    """Every prompt token's logits in one ragged batch, then four decode steps, each beside transformers alone.

    Dynamic RoPE beyond the limit rests on each sequence's own length, which is what transformers does in batches of 1;
    its module keeps the longest length it has seen, so every sequence gets a new one.
    """
    model = random_llama(options)
    model.save_pretrained(tmp_path)
    session = session_of(tmp_path)
    prompts = [torch.randint(SIZES["vocab_size"], (n,)) for n in (1, 7, 100)]
    new_tokens = torch.randint(SIZES["vocab_size"], (4, 3))

    prefilled = session.prefill([prompt.tolist() for prompt in prompts], all_logits=True)
    decoded = [session.decode(tokens.int()).clone() for tokens in new_tokens]

    for b, logits in enumerate(prefilled.split([1, 7, 100])):
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
        output = model(prompts[b][None], use_cache=True)
        assert error(logits, output.logits[0]) < TOLERANCE
        for tokens, step in zip(new_tokens, decoded, strict=True):
            output = model(tokens[b].reshape(1, 1), past_key_values=output.past_key_values, use_cache=True)
            assert error(step[b], output.logits[0, 0]) < TOLERANCE


@torch.inference_mode()
def test_dynamic_rope_differs_beyond_the_limit(tmp_path):
    """The comparison above is not blind: the same weights with default RoPE give other logits beyond the limit."""
    torch.manual_seed(0)
    model = random_llama(MODELS["dynamic beyond the limit"])
    model.save_pretrained(tmp_path)
    prompt = torch.randint(SIZES["vocab_size"], (100,))
    model.config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    logits = session_of(tmp_path).prefill([prompt.tolist()], all_logits=True)
    assert error(logits, model(prompt[None]).logits[0]) > 100 * TOLERANCE
