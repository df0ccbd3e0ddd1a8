"""Lowered networks of several ranks, interpreted in lock-step, against one rank's network; engines built of them."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("tensorrt_rtx")

from published_models import LLAMA, QWEN, baichuan_config, random_tensors

from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.decoder.mapping import Mapping
from trtbuild.decoder.sharding import shard
from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits, read_config
from trtbuild.engine.interpreter import Interpreter
from trtbuild.engine.tensorrt import LoweredNetwork
from trtbuild.errors import UserError
from trtbuild.linear.format import round_8bit
from trtbuild.models.config import ModelConfig
from trtbuild.models.families import canonical_config, config_from_hugging_face
from trtbuild.network import Network, lockstep
from trtbuild.network.ops.collectives import Receive, Send
from trtbuild.network.step import Chunk, step_tensors, whole_prompts
from trtbuild.runtime.lowered_session import is_quantized, lowered_inputs, write_rows
from trtbuild.runtime.open import open_engine
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.quantized_weight import QuantizedWeight, Weight

PROMPTS, LENGTH = [[5, 300, 7], [1, 159, 160, 319, 4], [42]], 12
NEXT = [11, 160, 301]
WIDE = {"hidden_size": 64, "num_attention_heads": 4}
MODELS = {
    "llama": LLAMA | WIDE | {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "llama, tied, a vocabulary that does not divide": LLAMA
    | WIDE
    | {"num_key_value_heads": 2, "vocab_size": 321, "tie_word_embeddings": True},
    "qwen beyond its length": QWEN | WIDE | {"seq_length": 6},
    "baichuan 13b": baichuan_config("v2_13b", hidden_size=96, num_attention_heads=12),
}
layouts = pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (4, 1), (1, 3), (2, 2)])
pytestmark = pytest.mark.usefixtures("one_thread")


def config_of(name: str) -> ModelConfig:
    version = "v2_13b" if name.startswith("baichuan") else None
    return config_from_hugging_face(canonical_config(MODELS[name], "test", version), "test")


def networks_of(
    config: ModelConfig,
    mapping: Mapping,
    scales: CacheScales | None = None,
    dtype: torch.dtype = torch.float32,
    tensors: dict[str, Weight] | None = None,
) -> list[Network]:
    tensors = tensors or {name: from_tensor(x) for name, x in random_tensors(config.tensor_shapes()).items()}
    networks = []
    for own in mapping.ranks:
        share, weights, cache = shard(config, tensors.__getitem__, scales, own)
        networks.append(decoder(share, weights, dtype, LENGTH, cache, own))
    return networks


def steps() -> list[list[Chunk]]:
    """Whole prompts, and their next tokens."""
    lengths = [len(prompt) for prompt in PROMPTS]
    after = [Chunk([NEXT[i]], n, past=n, slot=i) for i, n in enumerate(lengths)]
    return [whole_prompts(PROMPTS, all_logits=True), after]


def empty_caches(network: Network) -> dict[str, torch.Tensor]:
    shapes = {name: network.tensors[name] for name in network.states}
    return {name: torch.zeros((len(PROMPTS), *x.shape[1:]), dtype=x.dtype) for name, x in shapes.items()}


def reference(network: Network) -> torch.Tensor:
    caches, rows = empty_caches(network), []
    for chunks in steps():
        (outputs,) = lockstep.run([network], [step_tensors(chunks, network.inputs) | caches])
        caches = {name: outputs[state] for name, state in network.states.items()}
        rows.append(outputs["logits"])
    return torch.cat(rows)


def engine(interpreter: Interpreter, mapping: Mapping, inputs: lockstep.Values) -> lockstep.Run:
    """One rank's step: its engine, and what passes between stages outside of it."""
    if not mapping.is_first:
        inputs = inputs | {"received": (yield Receive(mapping.rank - mapping.tp_size, "float32", 0), {})}
    outputs = yield from interpreter.walk(inputs)
    if not mapping.is_last:
        yield Send(mapping.rank + mapping.tp_size), {"x": outputs["sent"]}
    return outputs


def interpreted(networks: list[Network], mapping: Mapping, packed: bool) -> list[torch.Tensor]:
    """Of every rank of the last stage."""
    interpreters = [Interpreter(LoweredNetwork(network, packed)) for network in networks]
    caches, rows = [empty_caches(network) for network in networks], {}
    for chunks in steps():
        given = lowered_inputs(chunks, packed)
        runs = [
            engine(interpreter, own, given | held)
            for interpreter, own, held in zip(interpreters, mapping.ranks, caches, strict=True)
        ]
        for rank, outputs in enumerate(lockstep.meet(runs)):
            for name, state in networks[rank].states.items():
                if is_quantized(caches[rank][name]):
                    write_rows(caches[rank][name], outputs[state], given["past_lengths"])
                else:
                    caches[rank][name] = outputs[state]
            if "logits" in outputs:
                rows.setdefault(rank, []).append(outputs["logits"])
    return [torch.cat(found) for found in rows.values()]


@layouts
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_interpreted_ranks_equal_one(name, packed, tp_size, pp_size):
    config, mapping = config_of(name), Mapping(tp_size, pp_size)
    expected = reference(*networks_of(config, Mapping()))
    results = interpreted(networks_of(config, mapping), mapping, packed)
    assert len(results) == tp_size
    for result in results:
        assert (result - expected).norm() / expected.norm() < 1e-5
    assert all(torch.equal(a, b) for a, b in pairwise(results))


def test_scales_of_a_cache_are_those_of_a_ranks_heads():
    config, mapping = config_of("llama"), Mapping(2, 2)
    scales = [(0.5 + torch.rand(config.num_hidden_layers, 2)) / 20 for _ in range(2)]
    cache = CacheScales(torch.int8, *scales)
    expected = reference(*networks_of(config, Mapping(), cache))
    for result in interpreted(networks_of(config, mapping, cache), mapping, packed=True):
        assert (result - expected).norm() / expected.norm() < 0.02  # a value near the middle of two may go either way


def rounded(weight: torch.Tensor) -> QuantizedWeight:
    values, scales = round_8bit(weight, torch.int8, per_tensor=False)
    return QuantizedWeight("int8", from_tensor(values), from_tensor(scales), activations="token")


def test_a_token_has_one_scale_on_all_ranks():
    config, mapping = config_of("llama"), Mapping(2, 1)
    tensors = {name: from_tensor(x) for name, x in random_tensors(config.tensor_shapes()).items()}
    tensors |= {name: rounded(x.load()) for name, x in tensors.items() if name.endswith("proj.weight")}
    expected = reference(*networks_of(config, Mapping(), tensors=tensors))
    for result in interpreted(networks_of(config, mapping, tensors=tensors), mapping, packed=True):
        assert (result - expected).norm() / expected.norm() < 0.01  # as above


@pytest.mark.slow
def test_engines_of_ranks_are_built(tiny_checkpoint, tmp_path):
    options = {"limits": BuildLimits(2, 8, 4), "mapping": Mapping(2, 2), "compute_capabilities": ["8.9"]}
    recipe, engines = {"dtype": "float16"}, ["portable", "tensorrt"]
    build_engine_dir(tiny_checkpoint, tmp_path / "engine", model="tiny", recipe=recipe, engines=engines, **options)
    outputs = read_config(tmp_path / "engine")["outputs"]
    assert list(outputs) == [f"rank{rank}.{ending}" for rank in range(4) for ending in ("safetensors", "engine")]
    with pytest.raises(UserError, match="mpiexec -n 4"):
        open_engine(tmp_path / "engine", "tensorrt")


@pytest.mark.slow
def test_padded_engines_of_ranks_are_built():
    for network in networks_of(config_of("llama"), Mapping(2, 2), dtype=torch.float16):
        assert LoweredNetwork(network, False).build(BuildLimits(2, 8, 4), ["8.9"]).nbytes > 10_000
