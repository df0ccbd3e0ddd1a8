"""One rank's share of weights and scales: what all ranks have, joined again, is the whole; sizes that do not divide."""

from collections.abc import Callable
from fnmatch import fnmatch

import pytest
import torch
from published_models import LLAMA, QWEN
from transformers import LlamaForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig

from trtbuild.decoder.decoder import CacheScales
from trtbuild.decoder.mapping import Mapping
from trtbuild.decoder.sharding import joined_cache, shard, tp_sizes
from trtbuild.errors import UserError
from trtbuild.models.config import SHARED_DIMENSIONS, ModelConfig
from trtbuild.models.families import config_from_hugging_face
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.quantized_weight import QuantizedWeight

WIDE = {"hidden_size": 64, "num_attention_heads": 8, "intermediate_size": 96}
MODELS = {
    "heads": WIDE | {"num_key_value_heads": 8},
    "grouped heads": WIDE | {"num_key_value_heads": 4},
    "fewer KV heads than ranks": WIDE | {"num_key_value_heads": 2},
    "one KV head": WIDE | {"num_key_value_heads": 1},
    "tied": WIDE | {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "biases": WIDE | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    "a vocabulary that does not divide": WIDE | {"num_key_value_heads": 4, "vocab_size": 321},
}
models = pytest.mark.parametrize("name", MODELS)


def config_of(name: str, **changes) -> ModelConfig:
    return config_from_hugging_face(LLAMA | MODELS[name] | changes, "test")


def tensors_of(config: ModelConfig) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in config.tensor_shapes().items()}


def shares(config: ModelConfig, weights: Callable, tp_size: int, cache: CacheScales | None = None) -> list[tuple]:
    return [shard(config, weights, cache, Mapping(tp_size, 1, rank)) for rank in range(tp_size)]


def test_dimensions_are_those_of_transformers():
    """Its plan for LLaMA; it leaves the embedding whole."""
    plan = {f"model.{name}": how for name, how in LlamaConfig.base_model_tp_plan.items()} | LlamaForCausalLM._tp_plan
    for name, dim in SHARED_DIMENSIONS.items():
        full = f"model.layers.*.{name}" if name.startswith(("self_attn", "mlp")) else name
        how = [how for pattern, how in plan.items() if fnmatch(full, pattern)]
        if name != "model.embed_tokens":
            assert how[0].startswith("rowwise" if dim else "colwise"), name
    assert {pattern.rpartition("*.")[2] for pattern in plan} == SHARED_DIMENSIONS.keys() - {"model.embed_tokens"}


@models
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_shares_make_the_whole(name, tp_size):
    config = config_of(name)
    whole = tensors_of(config)
    ranks = shares(config, lambda name: from_tensor(whole[name]), tp_size)
    for tensor, value in whole.items():
        parts = [weights(tensor) for _, weights, _ in ranks]
        assert all(part.shape == part.load().shape for part in parts)
        parts = [part.load() for part in parts]
        words = tensor.startswith(("model.embed", "lm_head"))
        if "norm" in tensor or (words and config.vocab_size % tp_size):
            assert all(torch.equal(part, value) for part in parts), tensor
        elif tensor.endswith(("o_proj.bias", "down_proj.bias")):
            assert torch.equal(sum(parts), value)
        else:
            once = parts
            if "k_proj" in tensor or "v_proj" in tensor:
                times = max(1, tp_size // config.num_key_value_heads)  # as often each KV head is there
                once = parts[::times]
                assert all(torch.equal(part, once[i // times]) for i, part in enumerate(parts))
            dim = 1 if tensor.endswith(("o_proj.weight", "down_proj.weight")) else 0
            assert torch.equal(torch.cat(once, dim), value)


@models
@pytest.mark.parametrize("tp_size", [2, 4, 8])
def test_heads_find_their_kv_heads(name, tp_size):
    """Head `h` of the whole reads KV head `h // group`; so it does among those of its rank."""
    config = config_of(name)
    whole = tensors_of(config)
    layer, size = "model.layers.1.self_attn", config.head_dim
    keys = whole[f"{layer}.k_proj.weight"].unflatten(0, (-1, size))
    seen = []
    for share, weights, _ in shares(config, lambda name: from_tensor(whole[name]), tp_size):
        group = share.num_attention_heads // share.num_key_value_heads
        own = weights(f"{layer}.k_proj.weight").load().unflatten(0, (-1, size))
        seen += [own[h // group] for h in range(share.num_attention_heads)]
    assert torch.equal(torch.stack(seen), keys.repeat_interleave(config.num_attention_heads // len(keys), 0))


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_configuration_and_scales(tp_size):
    config = config_of("fewer KV heads than ranks")
    scales = torch.arange(6.0).view(3, 2), torch.arange(10.0, 16).view(3, 2)
    for rank, (share, _, cache) in enumerate(shares(config, None, tp_size, CacheScales(torch.int8, *scales))):
        assert (share.num_attention_heads, share.intermediate_size) == (8 // tp_size, 96 // tp_size)
        assert (share.hidden_size, share.head_dim, share.vocab_size, share.num_hidden_layers) == (64, 8, 320, 3)
        heads = slice(0, 2) if tp_size == 1 else slice(rank * 2 // tp_size, rank * 2 // tp_size + 1)
        assert share.num_key_value_heads == heads.stop - heads.start
        assert torch.equal(cache.key_scales, scales[0][:, heads])
        assert torch.equal(cache.value_scales, scales[1][:, heads])
        assert cache.dtype == torch.int8


def test_only_a_part_is_checked_to_fit():
    """What a rank does not have may be anything: it is not even rounded."""
    config = config_of("grouped heads")
    whole = tensors_of(config)
    whole["model.layers.0.self_attn.o_proj.weight"][5, 40] = torch.inf
    ranks = shares(config, lambda name: from_tensor(whole[name]).fitting(torch.float16, name), 2)
    ranks[0][1]("model.layers.0.self_attn.o_proj.weight").load()
    with pytest.raises(UserError, match="holds NaN"):
        ranks[1][1]("model.layers.0.self_attn.o_proj.weight").load()


# Quantized weights


def int4(groups: int, order: bool = False) -> Callable[[str], QuantizedWeight]:
    """`[64, 96]`."""
    draw = torch.Generator().manual_seed(0)
    values = torch.randint(-8, 8, (64, 96), generator=draw, dtype=torch.int8)
    indices = from_tensor(torch.randperm(96, generator=draw).int()) if order else None
    scales = from_tensor(torch.rand(64, groups, generator=draw))
    return lambda name: QuantizedWeight("int4", from_tensor(values), scales, order=indices)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.layers.0.self_attn.q_proj.weight"])
def test_quantized_shares(name, groups):
    config = config_of("grouped heads")
    weights = int4(groups)
    parts = [weight(name).dequantize().load() for _, weight, _ in shares(config, weights, 2)]
    assert torch.equal(torch.cat(parts, 1 if "down" in name else 0), weights(name).dequantize().load())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (int4(3), "96 input channels in groups of 32 do not divide by tp_size 2; use one of 1"),
        (
            int4(6, order=True),
            "its groups are of input channels that lie anywhere (desc_act), which ranks cannot share; use tp_size 1, "
            "or weights without desc_act",
        ),
    ],
)
def test_groups_that_ranks_cannot_share(weights, message):
    name = "model.layers.0.mlp.down_proj.weight"
    (_, first, _), _ = shares(config_of("grouped heads"), weights, 2)
    with pytest.raises(UserError) as caught:
        first(name)
    assert str(caught.value) == f"{name}: {message}"


def test_group_sizes_that_fit_are_named():
    (_, first, _), *_ = shares(config_of("grouped heads"), int4(6), 4)
    with pytest.raises(UserError, match=r"groups of 16 do not divide by tp_size 4; use one of 1, 2$"):
        first("model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize(("tp_size", "size"), [(2, 64), (4, 32)])
def test_groups_that_fit_are_named(tp_size, size):
    """Baichuan 13B has 107 groups of 128 within the MLP."""
    sizes = {"hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 40, "intermediate_size": 13696}
    config = config_from_hugging_face(LLAMA | sizes, "test")
    values, scales = torch.empty(5120, 13696, dtype=torch.int8, device="meta"), torch.empty(5120, 107, device="meta")
    weight = QuantizedWeight("int4", from_tensor(values), from_tensor(scales))
    (_, first, _), *_ = shares(config, lambda name: weight, tp_size)
    with pytest.raises(UserError) as caught:
        first("model.layers.0.mlp.down_proj.weight")
    assert str(caught.value) == (
        "model.layers.0.mlp.down_proj.weight: 13696 input channels in groups of 128 do not divide by tp_size "
        f"{tp_size}; use one of 1, or weights in groups of {size}"
    )


# Sizes that do not divide


@pytest.mark.parametrize(
    ("changes", "tp_size", "message"),
    [
        ({}, 4, "tp_size 4 does not divide 6 heads, 2 KV heads and an intermediate_size of 80; use one of 1, 2"),
        ({}, 6, "tp_size 6 does not divide 6 heads, 2 KV heads and an intermediate_size of 80; use one of 1, 2"),
        (
            {"intermediate_size": 84},
            3,  # its second rank's heads would read both KV heads
            "tp_size 3 does not divide 6 heads, 2 KV heads and an intermediate_size of 84; use one of 1, 2, 6",
        ),
    ],
)
def test_sizes_that_would_divide_are_named(changes, tp_size, message):
    config = config_from_hugging_face(LLAMA | changes, "test")
    with pytest.raises(UserError) as caught:
        shard(config, None, None, Mapping(tp_size))
    assert str(caught.value) == message
    for size in tp_sizes(config):
        shares(config, None, size)


def test_more_stages_than_layers():
    config = config_from_hugging_face(QWEN, "test")
    shard(config, None, None, Mapping(1, 3))
    with pytest.raises(UserError, match="pp_size 4 is more than the model's 3 layers"):
        shard(config, None, None, Mapping(1, 4))


@models
@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (4, 1), (1, 2), (4, 2)])
def test_cache_scales_are_joined_again(name, tp_size, pp_size):
    config = config_of(name)
    scales = torch.rand(2, config.num_hidden_layers, config.num_key_value_heads)
    whole = CacheScales(torch.int8, *scales)
    caches = []
    for mapping in Mapping(tp_size, pp_size).ranks:
        own = shard(config, None, whole, mapping)[2]
        layers = list(mapping.layers(config.num_hidden_layers))
        caches.append(CacheScales(own.dtype, own.key_scales[layers], own.value_scales[layers]))
    joined = joined_cache(caches, config.num_key_value_heads, Mapping(tp_size, pp_size))
    assert joined.dtype == torch.int8
    assert torch.equal(torch.stack([joined.key_scales, joined.value_scales]), scales)
    assert joined_cache([None] * len(caches), config.num_key_value_heads, Mapping(tp_size, pp_size)) is None
