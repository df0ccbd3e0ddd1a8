"""Ranks in lock-step against one rank: small models of every family, prompts and decode steps, quantized too."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from published_models import LLAMA, QWEN, Tensors, baichuan_config, baichuan_tensors, llama_tensors, qwen_tensors
from rounded_weights import rounded

from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.decoder.mapping import Mapping
from trtbuild.decoder.sharding import shard
from trtbuild.engine.fused import FEW, MANY, SUM
from trtbuild.engine.fusion import Fused, fuse
from trtbuild.linear.linear import WEIGHT_FORMATS, Weight
from trtbuild.models.config import ModelConfig
from trtbuild.models.families import canonical_config, config_from_hugging_face, family_of
from trtbuild.network import Network, lockstep
from trtbuild.network.ops.add import add
from trtbuild.network.ops.collectives import Collective, all_reduce
from trtbuild.network.ops.rms_norm import rms_norm
from trtbuild.network.ranks import Ranks
from trtbuild.network.step import Chunk, Step, step_tensors
from trtbuild.tensors.lazy import LazyTensor, from_tensor
from trtbuild.tensors.rounding import DTYPES, LIMIT

LAYOUTS = [(2, 1), (4, 1), (1, 2), (2, 2), (4, 3)]
PROMPTS, STEPS, LENGTH = (13, 1, 22), 3, 26
# Norm of the difference over the norm of all logits: float32 sums in another order.
EXACT = 1e-6
layouts = pytest.mark.parametrize(("tp_size", "pp_size"), LAYOUTS)
pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Model:
    config: ModelConfig
    tensors: dict[str, LazyTensor]


def published(config: dict, tensors: Tensors, version: str | None = None) -> Model:
    canonical = canonical_config(config, "test", version)
    lazy = {name: from_tensor(x) for name, x in tensors.items()}
    lazy = family_of(config, "test").canonical_tensors(lazy, canonical)
    model = config_from_hugging_face(canonical, "test")
    return Model(model, {name: lazy[name] for name in model.tensor_shapes()})


def llama(**changes) -> Model:
    config = LLAMA | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4} | changes
    tensors = llama_tensors(config)
    generator = torch.Generator().manual_seed(1)
    shapes = config_from_hugging_face(config, "test").tensor_shapes()
    biases = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items() if "bias" in name}
    return published(config, tensors | biases)


def qwen(**changes) -> Model:
    config = QWEN | {"hidden_size": 64, "num_attention_heads": 4} | changes
    return published(config, qwen_tensors(config))


def baichuan(version: str, **changes) -> Model:
    config = baichuan_config(version, hidden_size=96, num_attention_heads=12, **changes)
    return published(config, baichuan_tensors(config), version)


MODELS = {
    "llama": llama,
    "llama, 2 KV heads": partial(llama, num_key_value_heads=2),
    "llama, 1 KV head": partial(llama, num_key_value_heads=1),
    "llama, tied": partial(llama, tie_word_embeddings=True),
    "llama, biases": partial(llama, attention_bias=True, mlp_bias=True),
    "llama, a vocabulary that does not divide": partial(llama, vocab_size=321),
    "llama, tied, a vocabulary that does not divide": partial(llama, vocab_size=321, tie_word_embeddings=True),
    "llama, dynamic NTK": partial(
        llama, max_position_embeddings=16, rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "codellama": partial(llama, rope_theta=1e6, num_key_value_heads=8),
    "yi": partial(llama, rope_theta=5e6, num_key_value_heads=2, num_hidden_layers=4),
    "qwen": qwen,
    "qwen beyond its length": partial(qwen, seq_length=6),
    "baichuan 7b": partial(baichuan, "v1_7b"),
    "baichuan2 7b": partial(baichuan, "v2_7b"),
    "baichuan 13b": partial(baichuan, "v1_13b"),
    "baichuan2 13b": partial(baichuan, "v2_13b"),
}


def world(tp_size: int, pp_size: int) -> list[Mapping]:
    return [Mapping(tp_size, pp_size, rank) for rank in range(tp_size * pp_size)]


def networks_of(
    config: ModelConfig,
    weights: Callable[[str], Weight],
    dtype: torch.dtype,
    scales: CacheScales | None,
    ranks: list[Mapping],
    length: int = LENGTH,
) -> list[Network]:
    """Those of some ranks, written and read again."""
    networks = []
    for mapping in ranks:
        share, own, own_scales = shard(config, weights, scales, mapping)
        network = decoder(share, own, dtype, length, own_scales, mapping)
        networks.append(Network.from_json(json.loads(json.dumps(network.to_json())), network.constants))
    return networks


def steps() -> Iterator[list[Chunk]]:
    """All prompts, then their next tokens, one a step."""
    draw = torch.Generator().manual_seed(0)
    for i in range(STEPS + 1):
        yield [
            Chunk(
                torch.randint(320, (n if i == 0 else 1,), generator=draw).tolist(),
                prompt_length=n,
                past=n + i - 1 if i else 0,
                slot=slot,
                all_logits=True,
            )
            for slot, n in enumerate(PROMPTS)
        ]


def logits(networks: list[Network]) -> list[torch.Tensor]:
    """Of all prompts' tokens and of those that follow, `[rows, vocab]`, as each rank of the last stage has them."""
    caches = []
    for network in networks:
        kinds = {name: network.tensors[name] for name in network.states}
        caches.append({name: torch.zeros((len(PROMPTS), *x.shape[1:]), dtype=x.dtype) for name, x in kinds.items()})
    rows: dict[int, list[torch.Tensor]] = {}
    for chunks in steps():
        inputs = [step_tensors(chunks, network.inputs) | own for network, own in zip(networks, caches, strict=True)]
        for rank, outputs in enumerate(lockstep.run(networks, inputs)):
            caches[rank] = {name: outputs[state] for name, state in networks[rank].states.items()}
            if "logits" in outputs:
                rows.setdefault(rank, []).append(outputs["logits"])
    return [torch.cat(own) for own in rows.values()]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@cache
def made(name: str) -> Model:
    return MODELS[name]()


@cache
def alone(name: str) -> torch.Tensor:
    model = made(name)
    (result,) = logits(networks_of(model.config, model.tensors.__getitem__, torch.float32, None, [Mapping()]))
    return result


@layouts
@pytest.mark.parametrize("name", MODELS)
def test_ranks_equal_one(name, tp_size, pp_size):
    model = made(name)
    ranks = world(tp_size, pp_size)
    results = logits(networks_of(model.config, model.tensors.__getitem__, torch.float32, None, ranks))
    assert len(results) == tp_size
    assert all(torch.equal(result, results[0]) for result in results)
    if tp_size == 1:
        assert torch.equal(results[0], alone(name))
    assert error(results[0], alone(name)) < EXACT


@layouts
@pytest.mark.parametrize("name", ["llama, biases", "qwen", "baichuan 13b"])
def test_only_several_ranks_meet(name, tp_size, pp_size):
    """Where: after what is shared by input channels, around the vocabulary, and between stages."""
    model = made(name)
    for mapping in (Mapping(), *(Mapping(tp_size, pp_size, rank) for rank in range(tp_size * pp_size))):
        (network,) = networks_of(model.config, model.tensors.__getitem__, torch.float32, None, [mapping])
        counts = Counter(type(node.op).__name__ for node in network.nodes if isinstance(node.op, Collective))
        layers, several = len(mapping.layers(model.config.num_hidden_layers)), mapping.tp_size > 1
        expected = {
            "AllReduce": several * (2 * layers + mapping.is_first),
            "AllGather": several * mapping.is_last,
            "Send": not mapping.is_last,
            "Receive": not mapping.is_first,
        }
        assert counts == {kind: n for kind, n in expected.items() if n}
        assert ("input_ids" in network.inputs, "logits" in network.outputs) == (mapping.is_first, mapping.is_last)
        caches = [name for name in network.inputs if name.startswith("key_cache.")]
        assert caches == [f"key_cache.{i}" for i in mapping.layers(model.config.num_hidden_layers)]


@pytest.mark.parametrize("rules", [FEW, MANY], ids=["few rows", "many rows"])
@pytest.mark.parametrize("name", ["llama, biases", "baichuan 13b"])
def test_a_rank_can_be_fused(name, rules):
    model = made(name)
    networks = networks_of(model.config, model.tensors.__getitem__, torch.float32, None, world(2, 2))
    fused = [fuse(network, rules) for network in networks]
    assert all(any(isinstance(node.op, Fused) for node in network.nodes) for network in fused)
    assert all(torch.equal(a, b) for a, b in zip(logits(fused), logits(networks), strict=True))


class Doubles(Ranks):
    """One of two ranks that have the same."""

    rank = 0
    all_gather = send = receive = broadcast = NotImplemented

    def all_reduce(self, x, first, size):
        return x.mul_(2)


@pytest.mark.parametrize("turned", [False, True])
def test_sum_addition_and_norm_are_one_operation(turned):
    network = Network()
    x, residual = (network.input(name, torch.float32, ("tokens", 6)) for name in ("x", "residual"))
    total = all_reduce(x, range(2))
    total = add(total, residual) if turned else add(residual, total)
    weight = torch.rand(6)
    rms_norm(total, network.constant("weight", from_tensor(weight)), 1e-3)
    (node,) = fuse(network, [SUM]).nodes
    given = {"x": torch.randn(3, 6), "residual": torch.randn(3, 6), "weight": weight}
    step = Step.of_chunks([Chunk([1, 2, 3], 3)], Doubles())
    found = node.op.kernel(step, **{name: x.clone() for name, x in given.items()})
    expected = 2 * given["x"] + given["residual"]
    assert found[0].allclose(expected)
    assert found[1].allclose(torch.nn.functional.rms_norm(expected, (6,), weight, 1e-3))


# Quantized weights and caches: in float64, in which no number lies so near to the middle of two that it is rounded
# to one by some ranks and to the other by more


def quantized(model: Model, kind: str | None) -> Callable[[str], Weight]:
    """Its weights, those of all products rounded, once."""
    products = ("proj.weight", "lm_head.weight") if kind else ()
    return cache(
        lambda name: (
            rounded(model.tensors[name].load(), kind, GROUP) if name.endswith(products) else model.tensors[name]
        )
    )


def scales_of(config: ModelConfig, dtype: torch.dtype | None) -> CacheScales | None:
    """Other ones for every head."""
    if dtype is None:
        return None
    draw = torch.Generator().manual_seed(2)
    shape = config.num_hidden_layers, config.num_key_value_heads
    keys, values = ((0.5 + torch.rand(shape, generator=draw)) * 4 / LIMIT[dtype] for _ in range(2))
    return CacheScales(dtype, keys, values)


GROUP = 8
QUANTIZED = {
    "llama": partial(llama, num_key_value_heads=2, intermediate_size=128, attention_bias=True, mlp_bias=True),
    "qwen": partial(qwen, intermediate_size=256, seq_length=6),
    "baichuan 13b": partial(baichuan, "v2_13b", intermediate_size=128),
}
EIGHT_BITS = [f"{known.dtype} {known.activations}" for known in WEIGHT_FORMATS if known.dtype in DTYPES]
CASES = [
    *[(kind, None) for kind in (*EIGHT_BITS, "int4 symmetric", "int4 asymmetric", "int4 rows")],
    *[(kind, dtype) for kind in (None, "int4 asymmetric") for dtype in DTYPES.values()],
]
models = pytest.mark.parametrize("name", QUANTIZED)


@models
@pytest.mark.parametrize(("kind", "dtype"), CASES, ids=str)
def test_quantized_ranks_equal_one(name, kind, dtype):
    model = QUANTIZED[name]()
    given = model.config, quantized(model, kind), torch.float64, scales_of(model.config, dtype)
    (expected,) = logits(networks_of(*given, [Mapping()]))
    for tp_size, pp_size in ((2, 1), (4, 1), (1, 2), (2, 2)):
        for result in logits(networks_of(*given, world(tp_size, pp_size))):
            assert error(result, expected) < EXACT, (tp_size, pp_size)
