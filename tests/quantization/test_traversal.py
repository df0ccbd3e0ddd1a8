"""Layer by layer through the decoder: the same numbers as `transformers`, also with another weight at a stop."""

import pytest
import torch
from outlier_models import write_model
from transformers import AutoModelForCausalLM

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.quantization.calibration import activation_ranges
from trtbuild.quantization.layer import PRODUCTS
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Quantization
from trtbuild.quantization.traversal import Traversal
from trtbuild.runtime.session import PortableSession

CPU = torch.device("cpu")
SAMPLES = [list(range(2, 2 + n)) for n in (5, 1, 30, 5)]
OPTIONS = {
    "plain": {},
    "biases and a tied head": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "rope scaling": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16},
}


@pytest.fixture(scope="module", params=OPTIONS)
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("traversal") / "checkpoint", **OPTIONS[request.param])


def error(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    assert [x.shape for x in actual] == [x.shape for x in expected]
    difference = torch.cat([(a - b).flatten() for a, b in zip(actual, expected, strict=True)])
    return (difference.norm() / torch.cat([x.flatten() for x in expected]).norm()).item()


def traverse(folder, replaced: dict[str, torch.Tensor] | None = None) -> tuple[dict, list]:
    """The inputs of every stop by name, and the hidden states of every sample after every layer.

    `replaced`: weights to put in place of a product's own.
    """
    checkpoint = Checkpoint(folder)
    traversal = Traversal(checkpoint, SAMPLES, CPU, map)
    inputs, hidden = {}, []
    for i in range(checkpoint.config.num_hidden_layers):
        for stop in traversal.layer(i):
            inputs[stop.name] = stop.inputs
            stop.weight = (replaced or {}).get(stop.name, stop.weight)
        hidden.append([batch.values["hidden"] for batch in traversal._batches])
    for stop in traversal.head():
        inputs[stop.name] = stop.inputs
    return inputs, hidden


@torch.inference_mode()
def expected(folder, replaced: dict[str, torch.Tensor] | None = None) -> tuple[dict, list]:
    """The same of `transformers`' model; `replaced` by projection. The last hidden states are normalized there."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs, hidden = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: inputs.setdefault(name, []).append(x[0][0]))
        if name in (replaced or {}):
            module.weight.copy_(replaced[name])
    for sample in SAMPLES:
        hidden.append([x[0] for x in model(torch.tensor([sample]), output_hidden_states=True).hidden_states[1:]])
    return inputs, [list(layer) for layer in zip(*hidden, strict=True)]


def test_inputs_and_hidden_states(folder):
    inputs, hidden = traverse(folder)
    theirs, their_hidden = expected(folder)
    products = [f"model.layers.{i}.{product}" for i in range(2) for product in PRODUCTS]
    assert list(inputs) == [*products, "lm_head"]
    assert error(hidden[0], their_hidden[0]) < 1e-5
    for name in products:
        prefix, _, product = name.partition(".self_attn." if "self_attn" in name else ".mlp.")
        part = next(parts[0] for key, parts in PRODUCTS.items() if key.endswith(product))
        assert error(inputs[name], theirs[f"{prefix}.{part}"]) < 1e-5
    assert error(inputs["lm_head"], their_hidden[-1]) < 1e-5
    assert error(inputs["lm_head"], theirs["lm_head"]) < 1e-5


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_replaced_weight_changes_what_follows(folder, product):
    """And nothing before it: as if the checkpoint had had it."""
    name, checkpoint = f"model.layers.0.{product}", Checkpoint(folder)
    shapes = {f"model.layers.0.{x}": checkpoint[f"model.layers.0.{x}.weight"].shape for x in PRODUCTS[product]}
    parts = {part: 0.2 * torch.randn(shape) for part, shape in shapes.items()}
    before, _ = traverse(folder)
    inputs, hidden = traverse(folder, {name: torch.cat(list(parts.values()))})
    _, their_hidden = expected(folder, parts)
    assert error(hidden[0], their_hidden[0]) < 1e-5
    assert error(inputs["lm_head"], their_hidden[-1]) < 1e-5
    changed = False
    for stop in inputs:
        same = all(torch.equal(a, b) for a, b in zip(inputs[stop], before[stop], strict=True))
        assert same != changed
        changed |= stop == name


def test_memory_does_not_grow(folder):
    """Between layers a sample has its hidden states and angles, and at every stop little more."""
    traversal = Traversal(Checkpoint(folder), SAMPLES, CPU, map)

    def held() -> list[int]:
        """Numbers that the batches hold for every layer, and within this one."""
        return [
            sum(x.numel() for batch in traversal._batches for x in values(batch).values())
            for values in (lambda batch: batch.values, lambda batch: batch.live)
        ]

    start = held()
    tokens = sum(map(len, SAMPLES))
    assert start[1] == 0
    for i in range(2):
        widest = 0
        for _ in traversal.layer(i):
            widest = max(widest, held()[1])
        assert widest == tokens * (128 + 64)  # down_proj's input beside the hidden states it is added to
        assert held() == start


def test_observe_keeps_the_largest(folder):
    """Over all samples, by name; asked for every operation of every layer."""
    kinds = []

    def observe(layer, node, inputs, outputs):
        kinds.append(type(node.op).__name__)
        return {node.outputs[0]: outputs[0].flatten(1).amax(0)}

    traversal = Traversal(Checkpoint(folder), SAMPLES, CPU, map, observe)
    stops = [stop for i in range(2) for stop in traversal.layer(i)]
    assert len(stops) == 8
    assert kinds.count("DenseLinear") == 8 * len(SAMPLES)
    assert kinds.count("Attention") == 2 * len(SAMPLES)
    assert all(x.ndim == 1 for name, x in traversal.observed.items() if "attention" not in name)


POSITIONS = {
    "alibi": {"family": "baichuan", "position_embedding": "alibi"},
    "qwen": {"family": "qwen", "ntk_length": 16, "logn_length": 8},
    "qwen, short": {"family": "qwen", "ntk_length": 512, "logn_length": 512},
}


@pytest.mark.parametrize("extension", POSITIONS.values(), ids=POSITIONS)
def test_positions_that_no_transformers_model_has(tmp_path, extension):
    """Layer by layer as in a session: what the head reads, and the keys and values that the caches receive."""
    checkpoint = Checkpoint(write_model(tmp_path / "checkpoint", trtbuild=extension))
    limits = BuildLimits(max_batch_size=1, max_input_len=32, max_output_len=1)
    network = decoder(checkpoint.config, checkpoint.__getitem__, torch.float32, limits.max_length)
    session = PortableSession(PortableEngine(network, limits, CPU))
    logits, largest = [], {}
    for sample in SAMPLES:
        logits.append(session.prefill([sample], all_logits=True))
        for name, cache in session.cache.buffers.items():
            kind, layer = name.split("_cache.")
            x = cache[0, :, : len(sample)].abs().amax(1).flatten()
            name = f"model.layers.{layer}.self_attn.{kind}"
            largest[name] = torch.maximum(x, largest.get(name, x))
    inputs, _ = traverse(checkpoint.folder)
    head = checkpoint["lm_head.weight"].load()
    assert error([x @ head.T for x in inputs["lm_head"]], logits) < 1e-5
    ranges = activation_ranges(checkpoint, SAMPLES, CPU)
    names = [name for name in ranges if name.endswith(("self_attn.key", "self_attn.value"))]
    assert {*names} == {*largest}
    assert error([ranges[name] for name in names], [largest[name] for name in names]) < 1e-5


def test_quantized_weights_are_widened(tmp_path):
    """A quantized checkpoint is walked with the numbers that its integers mean."""
    folder = write_model(tmp_path / "checkpoint")
    quantization = Quantization.parse({"dtype": "float32", "weights": {"dtype": "int4", "group_size": 32}})
    quantize(folder, tmp_path / "int4", quantization, device="cpu")
    checkpoint = Checkpoint(tmp_path / "int4")
    wide = write_model(tmp_path / "wide", {name: checkpoint.dequantized(name).load() for name in checkpoint.tensors})
    quantized, same, plain = (traverse(x)[0]["lm_head"] for x in (tmp_path / "int4", wide, folder))
    assert error(quantized, same) < 1e-6
    assert error(quantized, plain) > 0.02
