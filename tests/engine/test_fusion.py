"""Fused operations against those that they replace, in networks of every family and recipe; kernels are interpreted."""

from collections import Counter

import pytest
import torch

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from test_family_logits import FAMILIES, RECIPE_LIMITS, TOLERANCES, quantized, ragged, session  # noqa: F401
from test_recipes import RECIPES, adapted, error, logits, rounded_in_steps

from trtbuild.engine.config import BuildLimits
from trtbuild.engine.fusion import Fused, Rule, fuse
from trtbuild.engine.portable import PortableEngine
from trtbuild.linear.linear import linear
from trtbuild.network import Network, Tensor, lockstep, ops
from trtbuild.network.ops.add import Add
from trtbuild.network.ops.rms_norm import RmsNorm
from trtbuild.network.ops.swiglu import SwiGlu
from trtbuild.tensors.lazy import from_tensor

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
# Of one operation: the kernel rounds its result once, the chain after every operation. In bfloat16 the interpreter
# cuts off instead of rounding.
ROUNDING = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1.6e-2}


def fused_ops(network: Network) -> list[Fused]:
    return [node.op for node in network.nodes if isinstance(node.op, Fused)]


def kinds(network: Network) -> Counter:
    """How many operations of a name there are; fused ones have their kernel's."""
    names = (
        node.op.kernel.__name__ if isinstance(node.op, Fused) else type(node.op).__name__ for node in network.nodes
    )
    return Counter(names)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_fused_equals_unfused(quantized, tmp_path, monkeypatch, family, name):  # noqa: F811
    """Logits of a ragged batch and of decode steps; and every fused operation, in these, against its reference."""
    dtype = RECIPES[name]["dtype"]
    recipe = adapted(RECIPES[name], dtype)
    network = quantized.network(family, recipe, tmp_path / "engine")
    before, fused = kinds(network), fuse(network)
    layers = len([x for x in network.inputs if x.startswith("key_cache.")])
    expected = before - Counter(Add=2 * layers - 1, RmsNorm=2 * layers - 1, SwiGlu=layers)
    assert kinds(fused) == expected + Counter(add_rms_norm=2 * layers - 1, swiglu=layers)

    errors, run = [], Fused.portable

    def compared(self, step, *inputs):
        results, right = run(self, step, *inputs), self.reference(**dict(zip(self.inputs, inputs, strict=True)))
        if len(self.outputs) == 1:
            results, right = (results,), (right,)
        errors.extend(error(*pair) for pair in zip(results, right, strict=True))
        assert all(a.dtype == b.dtype for a, b in zip(results, right, strict=True))
        return results if len(results) > 1 else results[0]

    monkeypatch.setattr(Fused, "portable", compared)
    prompts, new_tokens, _ = ragged((5, 1, 8))
    rows, expected = (logits(session("portable", x, RECIPE_LIMITS), prompts, new_tokens[:2]) for x in (fused, network))
    assert len(errors) == 3 * (2 * (2 * layers - 1) + layers)  # a prompt's step and two more
    assert max(errors) < ROUNDING[dtype]
    best, median, worst = sorted(map(error, rows, expected))
    most, limit = TOLERANCES[rounded_in_steps(recipe), dtype]
    assert (best if dtype == "float32" else median) < most
    assert worst < limit


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
    fused = fuse(network, *([rules] if rules else []))
    assert kinds(fused) == expected
    assert all(torch.equal(a, b) for a, b in zip(run(fused), run(network), strict=True))
    assert network.nodes == nodes
    assert fused.inputs == network.inputs
    assert fused.outputs == network.outputs


NORM_ALONE = Rule("add_rms_norm", (Add, RmsNorm))


def test_a_sum_that_is_read_later(network, pair):
    x = ops.add(*pair)
    network.mark_output(ops.add(x, norm(x)), "out")
    check(network, {"add_rms_norm": 1, "Add": 1})
    check(network, {"Add": 2, "RmsNorm": 1}, NORM_ALONE)


def test_a_sum_that_is_read_before_its_norm(network, pair):
    x = ops.add(*pair)
    twice = ops.add(x, x)
    network.mark_output(ops.add(twice, norm(x)), "out")
    check(network, {"Add": 3, "RmsNorm": 1})


def test_a_sum_that_is_an_output(network, pair):
    x = ops.add(*pair)
    network.mark_output(norm(x), "out")
    network.mark_output(network.tensors[x.name], "sum")
    check(network, {"add_rms_norm": 1})
    check(network, {"Add": 1, "RmsNorm": 1}, NORM_ALONE)


def test_a_sum_that_nobody_else_reads(network, pair):
    network.mark_output(norm(ops.add(*pair)), "out")
    check(network, {"add_rms_norm": 1})
    check(network, {"add_rms_norm": 1}, NORM_ALONE)
    (op,) = fused_ops(fuse(network, [NORM_ALONE]))
    assert op.outputs == ("out",)


def test_two_norms_of_one_sum(network, pair):
    x = ops.add(*pair)
    network.mark_output(ops.add(norm(x), norm(x, "other")), "out")
    check(network, {"add_rms_norm": 1, "RmsNorm": 1, "Add": 1})
    check(network, {"Add": 2, "RmsNorm": 2}, NORM_ALONE)


def test_a_norm_of_something_else(network, pair):
    network.mark_output(ops.add(norm(pair[0]), pair[1]), "out")
    check(network, {"RmsNorm": 1, "Add": 1})


def test_one_operation_is_in_one_chain(network):
    wide = [network.input(name, torch.float32, ("tokens", 8)) for name in ("x", "y")]
    network.mark_output(ops.add(*map(ops.swiglu, wide)), "out")
    check(network, {"swiglu": 2, "Add": 1})
    check(network, {"swiglu": 1, "SwiGlu": 1}, Rule("swiglu", (SwiGlu, Add)))


def test_inputs_of_one_name_are_refused(network, pair):
    network.mark_output(norm(norm(pair[0]), "other"), "out")
    with pytest.raises(ValueError, match=r"^two inputs of .* have one name"):
        fuse(network, [Rule("add_rms_norm", (RmsNorm, RmsNorm))])


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
def test_the_layer_is_named(network, down, scale, name):
    x = network.input("x", torch.float16, ("tokens", 8))
    weight, sizes = torch.zeros(8, 8).half(), torch.full((8,), scale).half()
    weight[0, 0] = down / 4e4
    hidden = ops.add(x, linear(x, "model.layers.0.mlp.down_proj", [from_tensor(weight)]))
    sizes = network.constant("model.layers.1.input_layernorm.weight", from_tensor(sizes))
    product = linear(ops.rms_norm(hidden, sizes, 1e-5), "model.layers.1.self_attn.qkv_proj", [from_tensor(weight)])
    network.mark_output(ops.cast(ops.add(hidden, product), torch.float32), "logits")
    assert kinds(fuse(network))["add_rms_norm"] == 1
    for tested in (network, fuse(network)):
        engine = PortableEngine(tested, BuildLimits(1, 8, 8), CPU)
        inputs = {"x": torch.tensor([[4e4, *[0.0] * 7]]).half()}
        with engine.checked(), pytest.raises(FloatingPointError, match=f"^{name}$"):
            engine.run(None, inputs)
        assert not engine.run(None, inputs).isfinite().all()  # the search is over
