"""Products of few rows with weights of every format, interpreted."""

import pytest
import torch
import torch.nn.functional as F
from numerics import among_nan, relative_error

from trtbuild.linear.int4 import dequantize, pack
from trtbuild.tensors.rounding import quantize, scale_for

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels import few_rows
from trtbuild.kernels.few_rows import product, takes
from trtbuild.kernels.widen import interleave_int4

FP8 = torch.float8_e4m3fn
TOLERANCE = 5e-4  # the result's own rounding to float16
FORMATS = ("float16", "int8", "int4", "int4 zeros", "w8a8 token", "w8a8 static", "fp8 token", "fp8 static")
# rows, out, in, whether SwiGLU: a sum in one part and in several, the last of them short; sizes that no tile divides
SHAPES = [(2, 48, 128, False), (5, 34, 1312, True), (17, 70, 96, True), (9, 36, 512, True), (64, 32, 64, False)]
INPUT_SCALE = 1 / 64


def inputs(kind: str, out: int, width: int) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Weight, scales, zeros and input scale, as the kernel takes them; and the weight that they stand for, float64."""
    name, _, more = kind.partition(" ")
    if name == "float16":
        weight = torch.randn(out, width).half()
        return [weight, None, None, None], weight.double()
    if name == "int4":
        packed = pack(torch.randint(-8, 8, (out, width), dtype=torch.int8))
        scales = (torch.rand(out, width // min(width & -width, 128)) * 0.05).half()
        zeros = torch.randint(-8, 8, scales.shape, dtype=torch.int8) if more else None
        return [*interleave_int4(packed, scales, zeros), None], dequantize(packed, scales.double(), zeros)
    scales = torch.rand(out) * 0.01 + 0.001
    weight = (
        torch.randint(-128, 128, (out, width), dtype=torch.int8) if name != "fp8" else torch.randn(out, width).to(FP8)
    )
    input_scale = torch.tensor([INPUT_SCALE]) if more == "static" else None
    return [weight, scales, None, input_scale], weight.double() * scales[:, None]


def activations_of(kind: str) -> str:
    return kind.partition(" ")[2] if kind.startswith(("w8a8", "fp8")) else "16bit"


def rounded(x: torch.Tensor, kind: str, weight: torch.Tensor, input_scale: torch.Tensor | None) -> torch.Tensor:
    """What the product sees of `x`, float64."""
    if activations_of(kind) == "16bit":
        return x.double()
    scale = scale_for(x.float().abs().amax(-1, keepdim=True), weight.dtype) if input_scale is None else input_scale
    return quantize(x.float(), scale, weight.dtype).double() * scale


def activations(rows: int, width: int, kind: str) -> torch.Tensor:
    """Of FP8, multiples of what it holds, since the interpreter rounds to it in its own way."""
    x = torch.randn(rows, width)
    if kind.startswith("fp8"):
        x = x.to(FP8).float()
        x[:, 0] = 448
        x *= INPUT_SCALE
    return x.half()


def check(kind: str, rows: int, out: int, width: int, swiglu: bool) -> None:
    x, bias = among_nan(activations(rows, width, kind)), torch.randn(out).half()
    constants, wide = inputs(kind, out, width)
    expected = rounded(x, kind, constants[0], constants[3]) @ wide.T + bias.double()
    if swiglu:
        gate, up = expected.chunk(2, -1)
        expected = F.silu(gate) * up
    residual = torch.randn(expected.shape).half()
    assert takes(x, *constants[:3], activations_of(kind))
    more = {"activations": activations_of(kind), "swiglu": swiglu}
    actual = product(x, *constants, bias, residual=residual, **more)
    assert actual.dtype == x.dtype
    assert relative_error(actual, expected + residual.double()) < TOLERANCE
    again = product(x, *constants, bias, dtype=torch.float32, **more)  # sums in parts have left no trace
    assert again.dtype == torch.float32
    assert relative_error(again, expected) < TOLERANCE


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(("rows", "out", "width", "swiglu"), SHAPES)
def test_every_format(kind, rows, out, width, swiglu):
    check(kind, rows, out, width, swiglu)


@pytest.mark.parametrize("kind", FORMATS)
def test_swiglu_of_many_rows(kind):
    check(kind, 40, 34, 1312, True)


@pytest.mark.parametrize("kind", ["int8", "int4", "int4 zeros"])
@pytest.mark.parametrize("swiglu", [False, True])
def test_tiles_of_rows(kind, swiglu):
    check(kind, 130, 34, 160, swiglu)


@pytest.mark.parametrize(("columns", "parts"), [(4096, 2), (5504, 2), (6336, 2), (6368, 1), (11008, 1)])
def test_int8_parts_of_swiglu_run_side_by_side(columns, parts, monkeypatch):
    """On 132 multiprocessors; 5504 is one of two ranks' of LLaMA-7B."""
    monkeypatch.setattr(few_rows, "processors", lambda device: 132)
    x, weight = torch.empty(16, 2048).half(), torch.empty(2 * columns, 2048, dtype=torch.int8)
    tiles = few_rows._tiles(x, weight, True, None)
    assert few_rows._parts(tiles, -(-columns // tiles.n), x, weight, True) == parts


def test_norm():
    x, norm, weight = torch.randn(3, 64).half() * 200, torch.rand(64).half(), torch.randn(32, 64).half()
    expected = F.linear(F.rms_norm(x.double(), (64,), norm.double(), 1e-5), weight.double())
    assert relative_error(product(x, weight, norm=norm, eps=1e-5), expected) < 2 * TOLERANCE


def test_a_row_does_not_depend_on_the_others():
    x, weight = torch.randn(7, 2048).half(), torch.randn(32, 2048).half()
    x[3] = float("nan")
    y = product(x, weight)
    assert y[3].isnan().all()
    assert torch.equal(product(x[4:], weight), y[4:])


def test_what_is_not_taken():
    x, weight = torch.randn(4, 48).half(), torch.randn(16, 48).half()
    assert takes(x, weight, None, None, "16bit")
    assert not takes(x.float(), weight.float(), None, None, "16bit")
    packed = interleave_int4(pack(torch.zeros(16, 48, dtype=torch.int8)), torch.ones(16, 2).half())  # groups of 24
    assert not takes(x, *packed, "16bit")
    assert not takes(torch.randn(1000, 48).half(), weight, None, None, "16bit")
