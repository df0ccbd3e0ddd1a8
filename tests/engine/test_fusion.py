"""Fused operations against those that they replace, in networks of every family and recipe; kernels are interpreted."""

from collections import Counter
from typing import ClassVar

import pytest
import torch

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from numerics import relative_error
from rounded_weights import rounded
from test_family_logits import FAMILIES, RECIPE_LIMITS, TOLERANCES, quantized, ragged, session  # noqa: F401
from test_recipes import RECIPES, adapted, logits

from trtbuild import kernels
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.fused import FEW, MANY
from trtbuild.engine.fusion import Fused, Rule, fuse, maybe, one
from trtbuild.engine.portable import PortableEngine
from trtbuild.kernels import few_rows
from trtbuild.linear.linear import linear
from trtbuild.network import Network, Tensor, lockstep, ops
from trtbuild.network.ops.add import Add
from trtbuild.network.ops.cast import Cast
from trtbuild.network.ops.rms_norm import RmsNorm
from trtbuild.network.ops.swiglu import SwiGlu
from trtbuild.tensors.lazy import from_tensor

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture
def interpreted(monkeypatch):
    """Engines on the CPU run kernels, by Triton's interpreter, and what is fused for them."""
    monkeypatch.setattr(kernels, "run_on", lambda device: True)


def kinds(network: Network) -> Counter:
    """How many operations of a class there are."""
    return Counter(type(node.op).__name__ for node in network.nodes)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_chains_are_the_operations(quantized, tmp_path, family, name):  # noqa: F811
    """Without kernels the same bits, in a ragged batch and in decode steps."""
    network = quantized.network(family, adapted(RECIPES[name], RECIPES[name]["dtype"]), tmp_path / "engine")
    prompts, new_tokens, _ = ragged((5, 1, 8))
    expected, few, many = (
        logits(session("portable", x, RECIPE_LIMITS), prompts, new_tokens[:2])
        for x in (network, fuse(network, FEW), fuse(network, MANY))
    )
    for rows in zip(expected, few, many, strict=True):
        assert torch.equal(rows[0], rows[1])
        assert torch.equal(rows[0], rows[2])


# What may be replaced


def norm(x: Tensor, name: str = "norm") -> Tensor:
    return ops.rms_norm(x, x.network.constant(name, from_tensor(torch.rand(8) + 0.5)), 1e-5)


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def pair(network) -> tuple[Tensor, Tensor]:
    return tuple(network.input(name, torch.float32, ("tokens", 8)) for name in ("x", "y"))


def run(network: Network) -> list[torch.Tensor]:
    """The outputs, by references."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: (3, network.tensors[name].shape[1]) for name in network.inputs}
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return [*lockstep.run([network], [inputs])[0].values()]


def check(network: Network, expected: dict[str, int], *rules: Rule) -> None:
    """The fused network has these operations and computes the same; the network itself stays as it was."""
    nodes = list(network.nodes)
    fused = fuse(network, rules)
    assert kinds(fused) == expected
    assert all(torch.equal(a, b) for a, b in zip(run(fused), run(network), strict=True))
    assert network.nodes == nodes
    assert fused.inputs == network.inputs
    assert fused.outputs == network.outputs


class Hidden(Fused):
    """Inner tensors are nobody else's."""


class Kept(Fused):
    """The sum may be others'."""

    keeps = (Add,)


HIDDEN = Rule(Hidden, (one(Add), one(RmsNorm)))
KEPT = Rule(Kept, (one(Add), one(RmsNorm)))


def test_a_sum_that_is_read_later(network, pair):
    x = ops.add(*pair)
    network.mark_output(ops.add(x, norm(x)), "out")
    check(network, {"Kept": 1, "Add": 1}, KEPT)
    check(network, {"Add": 2, "RmsNorm": 1}, HIDDEN)


def test_a_sum_that_is_read_before_its_norm(network, pair):
    x = ops.add(*pair)
    twice = ops.add(x, x)
    network.mark_output(ops.add(twice, norm(x)), "out")
    check(network, {"Add": 3, "RmsNorm": 1}, KEPT)


def test_a_sum_that_is_an_output(network, pair):
    x = ops.add(*pair)
    network.mark_output(norm(x), "out")
    network.mark_output(network.tensors[x.name], "sum")
    check(network, {"Kept": 1}, KEPT)
    check(network, {"Add": 1, "RmsNorm": 1}, HIDDEN)


def test_a_sum_that_nobody_else_reads(network, pair):
    network.mark_output(norm(ops.add(*pair)), "out")
    check(network, {"Kept": 1}, KEPT)
    check(network, {"Hidden": 1}, HIDDEN)
    (node,) = fuse(network, [HIDDEN]).nodes
    assert node.outputs == ("out",)


def test_what_a_chain_is_for(network, pair):
    x = norm(ops.add(*pair))
    network.mark_output(norm(x, "other"), "out")
    check(network, {"Add": 1, "RmsNorm": 2}, Rule(Kept, KEPT.chain, before=Add))
    check(network, {"Kept": 1, "RmsNorm": 1}, Rule(Kept, KEPT.chain, before=RmsNorm))


def test_two_norms_of_one_sum(network, pair):
    x = ops.add(*pair)
    network.mark_output(ops.add(norm(x), norm(x, "other")), "out")
    check(network, {"Kept": 1, "RmsNorm": 1, "Add": 1}, KEPT)
    check(network, {"Add": 2, "RmsNorm": 2}, HIDDEN)


def test_a_norm_of_something_else(network, pair):
    network.mark_output(ops.add(norm(pair[0]), pair[1]), "out")
    check(network, {"RmsNorm": 1, "Add": 1}, KEPT)


def test_one_operation_is_in_one_chain(network, pair):
    network.mark_output(ops.add(*map(norm, pair, ("norm", "other"))), "out")
    check(network, {"Hidden": 1, "RmsNorm": 1}, Rule(Hidden, (one(RmsNorm), one(Add))))


def test_earlier_rules_go_first(network, pair):
    network.mark_output(norm(ops.add(*pair)), "out")
    check(network, {"Kept": 1}, KEPT, HIDDEN)
    check(network, {"Hidden": 1}, HIDDEN, KEPT)


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True), (False, False)])
def test_members_that_may_be_there(network, pair, before, after):
    x = norm(ops.add(*pair) if before else pair[0])
    network.mark_output(ops.cast(x, torch.float64) if after else x, "out")
    rule = Rule(Hidden, (maybe(Add), one(RmsNorm), maybe(Cast)))
    check(network, {"Hidden": 1}, rule)
    (node,) = fuse(network, [rule]).nodes
    assert [type(part.op) for part in node.op.nodes] == [Add] * before + [RmsNorm] + [Cast] * after


def test_what_others_read_too_ends_a_chain(network, pair):
    x = norm(pair[0])
    network.mark_output(ops.add(ops.add(x, pair[1]), x), "out")
    check(network, {"Hidden": 1, "Add": 2}, Rule(Hidden, (one(RmsNorm), maybe(Add))))


def test_what_an_operation_reads_twice_ends_a_chain(network, pair):
    """A kernel would get no second input."""
    x = norm(pair[0])
    network.mark_output(ops.add(x, x), "out")
    check(network, {"Hidden": 1, "Add": 1}, Rule(Hidden, (one(RmsNorm), maybe(Add))))


def test_inputs_of_one_name(network, pair):
    class Named(Fused):
        names: ClassVar = {(SwiGlu, "gate_up"): "wide", (Add, "a"): "residual", (Add, "b"): "residual"}

    network.mark_output(norm(norm(pair[0]), "other"), "out")
    with pytest.raises(ValueError, match=r"^two inputs of Hidden have one name"):
        fuse(network, [Rule(Hidden, (one(RmsNorm), one(RmsNorm)))])
    network = Network()
    wide, x = (network.input(name, torch.float32, ("tokens", n)) for name, n in (("wide", 16), ("x", 8)))
    network.mark_output(ops.add(x, ops.swiglu(wide)), "out")
    rule = Rule(Named, (one(SwiGlu), one(Add)))
    check(network, {"Named": 1}, rule)
    assert fuse(network, [rule]).nodes[0].inputs == {"wide": "wide", "residual": "x"}


# Scales of INT8 weights, a part of which is applied by what follows the product


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [2, 4], ids=["as they are", "widened"])
def test_scales_of_int8_weights(interpreted, monkeypatch, network, rows, bias):
    monkeypatch.setitem(few_rows.MAX_ROWS, "weight-only", 2)
    x, residual = (network.input(name, torch.float16, ("tokens", 32)) for name in ("x", "residual"))
    weights = [rounded(torch.randn(32, 32), "int8 16bit", 32, torch.float16) for _ in range(3)]
    biases = [from_tensor(torch.randn(32).half()) for _ in range(3)] if bias else []
    gate_up = linear(x, "gate_up_proj", weights[:2], biases[:2])
    product = linear(ops.swiglu(gate_up), "down_proj", weights[2:], biases[2:])
    total = ops.add(residual, product)
    norm = network.constant("norm", from_tensor(torch.rand(32).half()))
    network.mark_output(ops.add(total, ops.rms_norm(total, norm, 1e-5)), "y")
    fused = fuse(network, MANY)
    assert kinds(fused) == {"FusedInt8SwiGlu": 1, "FusedInt8Norm": 1, "Add": 1}
    constants = {name: value.load() for name, value in network.constants.items()}
    values = constants | {name: torch.randn(rows, 32).half() for name in network.inputs}
    for node in fused.nodes[:2]:
        given = {parameter: values[name] for parameter, name in node.inputs.items()}
        expected, actual = node.op.reference(**given), node.op.kernel(None, **given)
        for name, a, b in zip(
            node.outputs, *(x if isinstance(x, tuple) else (x,) for x in (actual, expected)), strict=True
        ):
            assert relative_error(a, b) < 1e-3
            values[name] = b


# Numbers that are not finite


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of numpy, by the interpreter
@pytest.mark.parametrize(
    ("down", "scale", "name"),
    [
        (3e4, 1, "model.layers.0.mlp.down_proj"),  # the sum alone: neither the product nor the hidden states
        (9e4, 1, "model.layers.0.mlp.down_proj"),
        (1, 4e4, "model.layers.1.input_layernorm"),
    ],
)
def test_the_layer_is_named(interpreted, network, down, scale, name):
    x = network.input("x", torch.float16, ("tokens", 8))
    weight, sizes = torch.zeros(8, 8).half(), torch.full((8,), scale).half()
    weight[0, 0] = down / 4e4
    hidden = ops.add(x, linear(x, "model.layers.0.mlp.down_proj", [from_tensor(weight)]))
    sizes = network.constant("model.layers.1.input_layernorm.weight", from_tensor(sizes))
    product = linear(ops.rms_norm(hidden, sizes, 1e-5), "model.layers.1.self_attn.qkv_proj", [from_tensor(weight)])
    network.mark_output(ops.cast(ops.add(hidden, product), torch.float32), "logits")
    engine = PortableEngine(network, BuildLimits(1, 8, 8), CPU)
    assert any(isinstance(node.op, Fused) for node in engine.few.nodes)
    inputs = {"x": torch.tensor([[4e4, *[0.0] * 7]]).half()}
    with engine.checked(), pytest.raises(FloatingPointError, match=f"^{name}$"):
        engine.run(None, inputs)
    engine.run(None, inputs)  # the search is over; what kernels keep in float32 may be finite
