"""AWQ: its objective, its scales, its clipping; and that smoothing leaves a layer's results alone."""

import pytest
import torch
from outlier_models import CONFIG, outlier_weights, write_model
from transformers import AutoModelForCausalLM

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.linear.int4 import Int4Grid
from trtbuild.quantization.awq import CLIP_STEPS, SCALE_STEPS, clip, output_error, search_scales
from trtbuild.quantization.layer import PRODUCTS, LayerWeights

CPU = torch.device("cpu")
GRID = Int4Grid(32, False, torch.float16)
products = pytest.mark.parametrize("product", PRODUCTS)
symmetries = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """4 query heads share 2 KV heads; with biases, which smoothing has to divide too."""
    return write_model(tmp_path_factory.mktemp("awq") / "checkpoint", attention_bias=True, mlp_bias=True)


@pytest.fixture
def layer(folder):
    return LayerWeights(Checkpoint(folder), 1, CPU)


def salient_inputs(width: int, factor: float = 20.0) -> torch.Tensor:
    """`[tokens, width]` in which one channel of every 16 is `factor` times larger."""
    inputs = torch.randn(300, width, generator=torch.Generator().manual_seed(0))
    inputs[:, 3::16] *= factor
    return inputs


def rounding_error(weight: torch.Tensor, inputs: torch.Tensor, grid: Int4Grid, scales=1.0) -> float:
    """The squared error of the outputs themselves, with a weight that is rounded as `weight * scales`."""
    rounded = Int4Grid.dequantize(*grid.round(weight * scales)) / scales
    return (inputs.double() @ (weight - rounded).double().T).square().sum().item()


def test_objective_is_the_error_of_the_outputs():
    weight, inputs = torch.randn(24, 64), salient_inputs(64)
    difference = weight - Int4Grid.dequantize(*GRID.round(weight))
    actual = output_error(difference, inputs.T @ inputs).item()
    assert actual == pytest.approx(rounding_error(weight, inputs, GRID), rel=1e-4)


# Scales


@products
def test_scales_help_salient_channels(layer, product):
    """At most 0.6 of the error without scales, also where the query heads of a group must share them."""
    weight = layer.weights[product]
    inputs = salient_inputs(weight.shape[1])
    scales = search_scales(layer, product, inputs.T @ inputs, inputs.abs().mean(0), GRID)
    wide = layer.expand(product, scales)
    assert scales.shape == ((32,) if product == "self_attn.o_proj" else (weight.shape[1],))
    assert rounding_error(weight, inputs, GRID, wide) < 0.6 * rounding_error(weight, inputs, GRID)
    assert wide[3::16].mean() > 2 * wide.mean()  # it is the salient channels that are scaled up


@products
def test_scales_are_the_best_candidate(layer, product):
    """The formula of the authors' code, written out; channel by channel where heads share none."""
    weight = layer.weights[product]
    inputs = salient_inputs(weight.shape[1], 5.0)
    chosen = search_scales(layer, product, inputs.T @ inputs, inputs.abs().mean(0), GRID)
    relative = torch.cat([(x / x.amax(1, keepdim=True)).mean(0) for x in weight.abs().split(32, 1)])
    active = inputs.abs().mean(0)
    if product == "self_attn.o_proj":  # heads 0 and 1 read the first value head, 2 and 3 the second
        relative, active = (x.view(2, 2, 16).mean(1).flatten() for x in (relative, active))
    candidates = [torch.ones_like(active)]
    for step in range(1, SCALE_STEPS):
        scales = active ** (step / 20) / (relative ** (1 - step / 20) + 1e-4)
        candidates.append(scales / (scales.max() * scales.min()).sqrt())
    errors = [rounding_error(weight, inputs, GRID, layer.expand(product, scales)) for scales in candidates]
    best = min(errors)
    assert errors[0] > best
    assert rounding_error(weight, inputs, GRID, layer.expand(product, chosen)) == pytest.approx(best, rel=1e-4)


def test_no_scales_where_none_help(layer):
    """Weights that are levels already, inputs that are all alike."""
    layer.weights["mlp.down_proj"] = torch.randint(-7, 8, (64, 128)).float()
    layer.weights["mlp.down_proj"][:, ::32], layer.weights["mlp.down_proj"][:, 1::32] = -8, 7
    scales = search_scales(layer, "mlp.down_proj", torch.eye(128), torch.ones(128), GRID)
    assert scales.equal(torch.ones(128))


def test_dead_channels(layer):
    """Neither an input that is never active nor weights that are all zero give scales that are not finite."""
    inputs = salient_inputs(128)
    inputs[:, :8] = 0
    layer.weights["mlp.down_proj"][:, 4:12] = 0
    layer.weights["mlp.down_proj"][5] = 0
    scales = search_scales(layer, "mlp.down_proj", inputs.T @ inputs, inputs.abs().mean(0), GRID)
    assert scales.isfinite().all()
    assert (scales > 0).all()


# Smoothing


@torch.inference_mode()
def run(folder, weights: dict[str, torch.Tensor], products: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Logits of `transformers`' model in float64 with some weights replaced, and what some products of layer 1 read."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    assert not model.load_state_dict(weights, strict=False).unexpected_keys
    seen = {}
    for name in products:
        module = model.get_submodule(f"model.layers.1.{name}")
        module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    return seen | {"logits": model(torch.arange(2, 40)[None]).logits}


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def whole_layer(layer: LayerWeights, i: int) -> dict[str, torch.Tensor]:
    """A copy of a layer's weights by canonical name."""
    parts = {
        f"{part}.weight": weight
        for product, weights in layer.weights.items()
        for part, weight in layer.parts(product, weights).items()
    }
    return {f"model.layers.{i}.{name}": x.clone() for name, x in (parts | layer.vectors).items()}


@pytest.mark.parametrize("chosen", [[product] for product in PRODUCTS] + [list(PRODUCTS)], ids=str)
def test_smoothing_leaves_the_model_alone(folder, layer, chosen):
    """One product or all four, unrounded: the same logits, with quite other weights."""
    expected, before = run(folder, {})["logits"], whole_layer(layer, 1)
    assert run(folder, before)["logits"].equal(expected)
    for product in chosen:
        channels = len(layer.reduce(product, layer.weights[product][0]))
        layer.smooth(product, torch.exp(torch.randn(channels)))
    after = whole_layer(layer, 1)
    assert difference(run(folder, after)["logits"], expected) < 1e-6
    changed = {name.removeprefix("model.layers.1.") for name in after if not after[name].equal(before[name])}
    touched = {
        "self_attn.qkv_proj": {"input_layernorm.weight", *(f"self_attn.{x}_proj.weight" for x in "qkv")},
        "self_attn.o_proj": {"self_attn.o_proj.weight", "self_attn.v_proj.weight", "self_attn.v_proj.bias"},
        "mlp.gate_up_proj": {"post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight"},
        "mlp.down_proj": {"mlp.down_proj.weight", "mlp.up_proj.weight", "mlp.up_proj.bias"},
    }
    assert changed == set().union(*(touched[product] for product in chosen))


def test_smoothing_divides_what_a_product_reads(folder, layer):
    """The inputs of `o_proj` and `down_proj` are the old ones over the scales."""
    scales = {"self_attn.o_proj": torch.exp(torch.randn(32)), "mlp.down_proj": torch.exp(torch.randn(128))}
    before = run(folder, {}, tuple(scales))
    for product, x in scales.items():
        layer.smooth(product, x)
    after = run(folder, whole_layer(layer, 1), tuple(scales))
    for product, x in scales.items():
        assert difference(after[product], before[product] / layer.expand(product, x).double()) < 1e-6


def test_reduce_and_expand(layer):
    """Query heads 0, 1 read value head 0 and 2, 3 head 1; other products keep their channels."""
    x = torch.arange(64.0)
    assert layer.reduce("self_attn.o_proj", x).equal(torch.cat((x[16:32], x[48:64])))
    assert layer.reduce("self_attn.o_proj", x, torch.mean).equal(torch.cat((x[:16] + 8, x[32:48] + 8)))
    heads = torch.arange(32.0)
    assert layer.expand("self_attn.o_proj", heads).equal(torch.cat((heads[:16],) * 2 + (heads[16:],) * 2))
    assert layer.reduce("mlp.down_proj", x) is layer.expand("mlp.down_proj", x) is x


# Clipping


def heavy_tails(out: int, width: int) -> torch.Tensor:
    weight = torch.randn(out, width, generator=torch.Generator().manual_seed(1))
    return weight * weight.abs() ** 0.7


@symmetries
def test_clip_takes_the_best_of_every_group(symmetric):
    """Each group's own error, computed from its inputs, is the least of all candidates, of which none is the first."""
    grid = Int4Grid(32, symmetric, torch.float32)
    weight, inputs = heavy_tails(24, 128), salient_inputs(128, 3.0)
    clipped = clip(weight, inputs.T @ inputs, grid)
    shares = [1 - 0.5 * step / CLIP_STEPS for step in range(CLIP_STEPS + 1)]
    chosen = 0
    for start in range(0, 128, 32):
        group, x = weight[:, start : start + 32], inputs[:, start : start + 32].double()

        def error(clamped: torch.Tensor, group=group, x=x) -> torch.Tensor:
            """Of the outputs, `[out]`."""
            return (x @ (group - Int4Grid.dequantize(*grid.round(clamped))).double().T).square().sum(0)

        largest = group.abs().amax(1, keepdim=True)
        errors = torch.stack([error(group.clamp(-largest * share, largest * share)) for share in shares])
        ours = error(clipped[:, start : start + 32])
        torch.testing.assert_close(ours, errors.amin(0), rtol=1e-4, atol=0)
        assert (ours <= errors[0] * (1 + 1e-6)).all()
        chosen += (errors.argmin(0) > 0).sum().item()
    assert chosen > 24  # of 96 groups


@symmetries
def test_clip_never_does_worse(symmetric):
    """In its objective, the sum over groups; and heavy tails gain at least a twentieth."""
    grid = Int4Grid(32, symmetric, torch.float16)
    inputs = salient_inputs(128, 3.0)
    gram = inputs.T @ inputs
    blocks = torch.block_diag(*(gram[i : i + 32, i : i + 32] for i in range(0, 128, 32)))
    for weight, gain in ((heavy_tails(24, 128), 0.95), (torch.rand(24, 128) * 2 - 1, 1.0), (torch.zeros(24, 128), 1.0)):
        rounded = [Int4Grid.dequantize(*grid.round(x)) for x in (clip(weight, gram, grid), weight)]
        ours, none = (output_error(weight - x, blocks).item() for x in rounded)
        assert ours <= gain * none * (1 + 1e-6)


def test_clip_of_one_group_a_row():
    weight, inputs = heavy_tails(8, 96), salient_inputs(96, 3.0)
    grid = Int4Grid(96, True, torch.float16)
    clipped = clip(weight, inputs.T @ inputs, grid)
    assert (clipped.abs().amax(1) < weight.abs().amax(1)).any()
    assert rounding_error(weight, inputs, grid) >= (
        (inputs.double() @ (weight - Int4Grid.dequantize(*grid.round(clipped))).double().T).square().sum().item()
    )


def test_small_models_weights_are_not_used_up(folder):
    """A layer is float32 and a copy: what smoothing does to it does not reach the checkpoint."""
    layer = LayerWeights(Checkpoint(folder), 0, CPU)
    layer.smooth("mlp.down_proj", torch.full((128,), 3.0))
    config = CONFIG | {"attention_bias": True, "mlp_bias": True}
    expected = outlier_weights(config)["model.layers.0.mlp.down_proj.weight"]
    assert LayerWeights(Checkpoint(folder), 0, CPU).weights["mlp.down_proj"].equal(expected)
