"""The product of one row, interpreted, in every weight format."""

import pytest
import torch
import torch.nn.functional as F
from numerics import among_nan, relative_error

from trtbuild.linear.int4 import dequantize, pack
from trtbuild.linear.w8a8 import W8A8Linear

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.one_row import _tiles, product, takes
from trtbuild.kernels.widen import interleave_int4

FP8 = torch.float8_e4m3fn
TOLERANCE = 5e-4  # the result's own rounding to float16
SUMS = 1e-4  # float32; in INT4 they are of larger numbers than those that are left
FORMATS = ["float16", "int8", "int4", "int4 zeros", "int8 static", "int8 token", "fp8 static", "fp8 token"]


def layer(kind: str, out: int, width: int, group_size: int = 32, input_scale: float = 0.02):
    """Constants of `product`, and the linear layer in float64."""
    scales = torch.rand(out) * 0.001
    if kind == "float16":
        weight = torch.randn(out, width).half()
        return {"weight": weight}, lambda x: x @ weight.double().T
    if kind == "int8":
        weight = torch.randint(-128, 128, (out, width), dtype=torch.int8)
        return {"weight": weight, "scales": scales}, lambda x: x @ (weight * scales.double()[:, None]).T
    if kind.startswith("int4"):
        packed = pack(torch.randint(-8, 8, (out, width), dtype=torch.int8))
        scales = (torch.rand(out, width // group_size) * 0.1).half()
        zeros = torch.randint(-8, 8, scales.shape, dtype=torch.int8) if "zeros" in kind else None
        prepared = dict(zip(("weight", "scales", "zeros"), interleave_int4(packed, scales, zeros), strict=True))
        return prepared, lambda x: x @ dequantize(packed, scales.double(), zeros).T
    name, activations = kind.split()
    weight = (torch.randn(out, width) * 40).to(torch.int8 if name == "int8" else FP8)
    constants = {"weight": weight, "scales": scales, "activations": activations}
    static = torch.tensor([input_scale]) if activations == "static" else None
    op = W8A8Linear(name, activations)
    return constants | {"input_scale": static}, lambda x: op.reference(x, weight, scales, static)


def expect(linear, x, norm, eps, bias, swiglu, residual) -> torch.Tensor:
    y = x.double() if norm is None else F.rms_norm(x.double(), norm.shape, norm.double(), eps)
    y = linear(y)
    if bias is not None:
        y += bias.double()
    if swiglu:
        gate, up = y.chunk(2, -1)
        y = F.silu(gate) * up
    return y if residual is None else y + residual.double()


# outputs and width: what tiles divide and what they do not, more than a tile, an odd width
@pytest.mark.parametrize(("out", "width"), [(6, 4128), (10, 96), (6, 33)])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("options", ["bias residual", "norm swiglu"])
def test_product(kind, out, width, options):
    if kind.startswith("int4"):
        width -= width % 32
    constants, linear = layer(kind, out, width)
    x, norm = torch.randn(1, width).half(), None
    if kind.startswith("fp8"):  # numbers that it can hold: the interpreter rounds to FP8 in its own way
        x = (x * 50).to(FP8).half() / 2
        x[0, 0] = 224
        constants, linear = layer(kind, out, width, input_scale=0.5)
    elif "norm" in options:
        norm = (torch.rand(width) + 0.5).half()
    bias = torch.randn(out).half() if "bias" in options else None
    swiglu = "swiglu" in options
    residual = torch.randn(1, out // (2 if swiglu else 1)).half() if "residual" in options else None
    expected = expect(linear, x, norm, 1e-5, bias, swiglu, residual)
    assert takes(x, constants["weight"], constants.get("scales"), None, constants.get("activations", "16bit"))
    after = {"bias": bias, "swiglu": swiglu, "residual": residual}
    actual = product(among_nan(x), **constants, norm=norm, eps=1e-5, **after)
    assert actual.dtype == torch.float16
    assert relative_error(actual, expected) < TOLERANCE
    wide = product(x, **constants, norm=norm, eps=1e-5, dtype=torch.float32, **after)
    assert relative_error(wide, expected) < SUMS


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_does_not_vanish(kind, value):
    constants, _ = layer(kind, 8, 64)
    x = torch.randn(1, 64).half()
    x[0, 5] = value
    for norm in (None, torch.ones(64).half()):
        assert not product(x, **constants, norm=norm, eps=1e-5).isfinite().any()


def test_a_norm_does_not_overflow():
    """Its weight times activations would, in float16."""
    constants, linear = layer("float16", 8, 64)
    x, norm = (torch.randn(1, 64) * 1e4).half(), torch.full((64,), 100.0).half()
    assert relative_error(product(x, **constants, norm=norm), expect(linear, x, norm, 0, None, False, None)) < TOLERANCE


def test_zeros_stay_zeros():
    for kind in FORMATS:
        constants, _ = layer(kind, 8, 64)
        assert (product(torch.zeros(1, 64).half(), **constants) == 0).all()


@pytest.mark.parametrize(("width", "size"), [(4096, 1024), (11008, 1024), (5120, 512), (13696, 1024)])
def test_int4_tiles_go_little_beyond_a_row(width, size):
    """Of LLaMA-7B and Baichuan2-13B; sizes are bytes."""
    assert _tiles(torch.empty(8, width // 2, dtype=torch.uint8), False) == (16, size, 4)


def test_what_it_does_not_take():
    constants, _ = layer("int4", 8, 96, group_size=24)
    weight, scales = constants["weight"], constants["scales"]
    assert not takes(torch.zeros(1, 96).half(), weight, scales, None, "16bit")
    dense = torch.zeros(8, 96).half()
    assert takes(torch.zeros(1, 96).half(), dense, None, None, "16bit")
    assert not takes(torch.zeros(2, 96).half(), dense, None, None, "16bit")
    assert not takes(torch.zeros(1, 96), dense.float(), None, None, "16bit")
