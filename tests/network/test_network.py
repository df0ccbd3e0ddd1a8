"""The network as a data structure: JSON and back, tied constants, names."""

import inspect
import json
import sys

import pytest
import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.linear.dense import DenseLinear
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network import Network, Op, ops
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import LazyTensor, from_tensor

LIMITS = BuildLimits(max_batch_size=2, max_input_len=12, max_output_len=4)


def logits(network: Network) -> torch.Tensor:
    session = PortableSession(PortableEngine(network, LIMITS, torch.device("cpu")))
    return session.prefill([[3, 1, 4], [1, 5, 9, 2, 6]], all_logits=True)


@pytest.fixture
def tiny_network(tiny_checkpoint) -> Network:
    checkpoint = Checkpoint(tiny_checkpoint)
    return decoder(checkpoint.config, checkpoint.__getitem__, torch.float32, LIMITS.max_length)


def test_json_round_trip(tiny_network):
    text = json.dumps(tiny_network.to_json())
    read = Network.from_json(json.loads(text), tiny_network.constants)
    assert json.dumps(read.to_json()) == text
    assert read.nodes == tiny_network.nodes
    assert {name: (t.dtype, t.shape) for name, t in read.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in tiny_network.tensors.items()
    }
    assert torch.equal(logits(read), logits(tiny_network))


def test_reading_checks_shapes_against_constants(tiny_network):
    constants = tiny_network.constants | {"model.norm.weight": from_tensor(torch.ones(63))}
    with pytest.raises(ValueError, match="rms_norm"):
        Network.from_json(tiny_network.to_json(), constants)


def test_decoder_constants_and_outputs(tiny_network):
    assert tiny_network.outputs == ["logits", *(f"present_{x}.{i}" for i in range(2) for x in ("key", "value"))]
    assert tiny_network.tensors["logits"].shape == ("rows", 320)
    assert tiny_network.constants["model.layers.1.self_attn.qkv_proj.weight"].shape == (128, 64)
    assert tiny_network.constants["model.layers.0.mlp.gate_up_proj.weight"].shape == (192, 64)


def test_tied_head_is_the_embedding_table(tiny_config):
    config = config_from_hugging_face(tiny_config | {"tie_word_embeddings": True}, "test")
    shapes = config.tensor_shapes()
    network = decoder(config, lambda name: from_tensor(torch.zeros(shapes[name])), torch.float16, 16)
    tables = [name for name, constant in network.constants.items() if constant.shape == (320, 64)]
    assert tables == ["model.embed_tokens.weight"]
    readers = [node for node in network.nodes if tables[0] in node.inputs.values()]
    assert [type(node.op).__name__ for node in readers] == ["Embedding", "DenseLinear"]


def test_a_constant_named_twice_is_one_tensor():
    network = Network()
    first = network.constant("w", from_tensor(torch.ones(4, 4)))
    assert network.constant("w", from_tensor(torch.ones(4, 4))) is first
    assert list(network.constants) == ["w"]


def test_a_constant_of_one_source_is_known_without_being_read():
    source = LazyTensor(torch.float32, (4, 4), lambda: pytest.fail("was loaded"))
    network = Network()
    first = network.constant("w", source.to(torch.float16))
    assert network.constant("w", source.to(torch.float16)) is first


@pytest.mark.parametrize(
    "other", [torch.ones(4, 3), torch.ones(4, 4).half(), torch.eye(4)], ids=["shape", "dtype", "x"]
)
def test_a_constant_has_one_value(other):
    network = Network()
    network.constant("w", from_tensor(torch.ones(4, 4)))
    with pytest.raises(ValueError, match="two values of the constant w"):
        network.constant("w", from_tensor(other))
    assert torch.equal(network.constants["w"].load(), torch.ones(4, 4))


def test_last_uses():
    network = Network()
    x, unread = (network.input(name, torch.float32, ("tokens", 4)) for name in ("x", "unread"))
    weight = network.constant("w", from_tensor(torch.ones(4)))
    first = ops.rms_norm(x, weight, 1e-5)
    second = ops.add(first, first)
    third = ops.rms_norm(ops.add(second, x), weight, 1e-5)
    network.mark_output(second, "second")
    assert network.last_uses() == {"x": 2, "w": 3, first.name: 1, network.nodes[3].inputs["x"]: 3, "second": 4}
    assert {unread.name, third.name}.isdisjoint(network.last_uses())


def test_an_absent_input_is_not_in_the_node():
    network = Network()
    x, weight = network.input("x", torch.float32, ("tokens", 4)), network.constant("w", from_tensor(torch.eye(4)))
    network.add(DenseLinear(), x=x, weight=weight, bias=None)
    assert network.nodes[0].inputs == {"x": "x", "weight": "w"}
    for wrong in ({"x": x}, {"x": x, "weight": weight, "scale": weight}):
        with pytest.raises(TypeError):
            network.add(DenseLinear(), **wrong)


@pytest.mark.parametrize("kind", [kind for kind in Op.kinds.values() if "infer" in vars(kind)])
def test_an_operations_inputs_have_one_order(kind):
    """In all methods: the engine binds them by position."""

    def parameters(method: str) -> list[str]:
        names = list(inspect.signature(getattr(kind, method)).parameters)[1:]
        return names[1:] if method in ("portable", "to_tensorrt") else names

    methods = [name for name in ("infer", "reference", "portable", "to_tensorrt") if name in vars(kind)]
    assert [parameters(name) for name in methods] == [parameters("infer")] * len(methods)


def test_building_takes_a_time_that_grows_with_the_layers(tiny_config):
    """Counted in calls of Python, for a network that is built and one that is read. No weight is loaded."""

    def calls(layers: int) -> int:
        config = config_from_hugging_face(tiny_config | {"num_hidden_layers": layers}, "test")
        weights = {
            name: LazyTensor(torch.float16, shape, lambda: pytest.fail("was loaded"))
            for name, shape in config.tensor_shapes().items()
        }
        count = 0

        def see(frame, event, argument) -> None:
            nonlocal count
            count += 1

        sys.setprofile(see)
        try:
            network = decoder(config, weights.__getitem__, torch.float16, 16)
            Network.from_json(network.to_json(), network.constants)
        finally:
            sys.setprofile(None)
        return count

    calls(2)  # what is imported or cached once
    assert calls(120) < 4.2 * calls(30)


def test_mark_output_renames_producer_and_consumers():
    network = Network()
    x = network.input("x", torch.float32, ("tokens", 4))
    hidden = network.add(DenseLinear(), x=x, weight=network.constant("w", from_tensor(torch.eye(4) * 2)))
    network.mark_output(ops.add(hidden, x), "sum")
    network.mark_output(hidden, "hidden")
    assert network.outputs == ["sum", "hidden"]
    assert [node.outputs for node in network.nodes] == [("hidden",), ("sum",)]
    assert network.nodes[1].inputs == {"a": "hidden", "b": "x"}
    assert set(network.tensors) == {"x", "w", "hidden", "sum"}
    assert Network.from_json(network.to_json(), network.constants).to_json() == network.to_json()


@pytest.mark.parametrize(
    "declare",
    [
        lambda network, x: network.input("w", torch.float32, ("tokens", 4)),
        lambda network, x: network.constant("x", from_tensor(torch.ones(4))),
        lambda network, x: network.mark_output(ops.add(x, x), "w"),
    ],
    ids=["input", "constant", "output"],
)
def test_a_taken_name_is_refused(declare):
    network = Network()
    x = network.input("x", torch.float32, ("tokens", 4))
    network.constant("w", from_tensor(torch.ones(4)))
    with pytest.raises(ValueError, match=r"two tensors are called [wx]$"):
        declare(network, x)
