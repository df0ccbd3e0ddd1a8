"""The Triton kernels on CUDA against their operations' references. Run by hand: `pytest -m gpu tests/gpu`."""

import itertools
from copy import copy

import pytest
import torch
import torch.nn.functional as F
from paged_caches import from_pages, in_pages

from trtbuild.linear.int4 import Int4Grid, Int4Linear, dequantize, pack
from trtbuild.linear.int8 import Int8Linear, partly_scaled
from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.models.alibi import alibi_slopes
from trtbuild.network.ops.attention import Attention
from trtbuild.network.ops.embedding import Embedding, EmbeddingPart
from trtbuild.network.ops.rotary_embedding import RotaryEmbedding
from trtbuild.network.ops.rotate import Rotate
from trtbuild.network.ops.scale_tokens import ScaleTokens
from trtbuild.network.ops.split_heads import SplitHeads
from trtbuild.tensors.rounding import DTYPES, quantize, scale_for

pytestmark = pytest.mark.gpu

FP8 = torch.float8_e4m3fn
# Relative errors: rounding the result alone, and, for attention, also the softmax's weights.
LINEAR_TOLERANCE = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-4}
ATTENTION_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.2e-2}
# out, in: LLaMA-7B's qkv, o, down; LLaMA-70B's q, k | v and down over 8 GPUs; SmolLM2's down; odd sizes
SHAPES = [(12288, 4096), (4096, 11008), (8192, 8192), (2048, 8192), (8192, 3584), (576, 1536), (33, 96)]
ROWS = [1, 3, 17, 64, 70]
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
shapes = pytest.mark.parametrize(("out", "width"), SHAPES)


def check(op, tolerance: float, x: torch.Tensor, **constants: torch.Tensor) -> None:
    """`portable` on prepared constants against `reference` in float64 (as far as it goes there), output poisoned."""
    narrow = (torch.float16, torch.bfloat16)
    wide = {name: c.double() if c.dtype in narrow else c for name, c in constants.items()}
    expected = op.reference(x.double(), **wide)
    poison = torch.full_like(expected, float("nan"), dtype=x.dtype)  # freed, so likely the memory of the result
    del poison
    actual = op.portable(None, x, **op.prepare(x.device, **constants))
    assert actual.dtype == x.dtype
    assert (actual.double() - expected).norm() / expected.norm() < tolerance


@dtypes
@shapes
@pytest.mark.parametrize("rows", ROWS)
def test_int8(rows, out, width, dtype):
    x, bias = torch.randn(rows, width, device="cuda").to(dtype), torch.randn(out, device="cuda").to(dtype)
    weight = torch.randint(-128, 128, (out, width), dtype=torch.int8, device="cuda")
    scale = torch.rand(out, device="cuda") * 0.01
    tolerance = LINEAR_TOLERANCE[dtype] * 1.5  # the weight is rounded for many rows
    check(Int8Linear(), tolerance, x, weight=weight, scales=scale)
    check(Int8Linear(), tolerance, x, weight=weight, scales=scale, bias=bias)


@dtypes
@pytest.mark.parametrize(
    ("out", "width", "group_size"),
    [(12288, 4096, 128), (4096, 11008, 128), (2048, 8192, 32), (8192, 3584, 64), (576, 1536, 1536), (33, 96, 96)],
)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4(rows, out, width, group_size, symmetric, dtype):
    x, bias = torch.randn(rows, width, device="cuda").to(dtype), torch.randn(out, device="cuda").to(dtype)
    weight = pack(torch.randint(-8, 8, (out, width), dtype=torch.int8, device="cuda"))
    scales = (torch.rand(out, width // group_size, device="cuda") * 0.1).to(dtype)
    constants = {"weight": weight, "scales": scales, "bias": bias}
    if not symmetric:
        constants["zeros"] = torch.randint(-8, 8, scales.shape, dtype=torch.int8, device="cuda")
    check(Int4Linear(), LINEAR_TOLERANCE[dtype] * 1.5, x, **constants)


@dtypes
def test_widen_is_exact(dtype):
    from trtbuild.kernels.widen import interleave_int4, widen

    weight = torch.randint(-128, 128, (1000, 352), dtype=torch.int8, device="cuda")
    scale = torch.rand(1000, device="cuda")
    assert torch.equal(widen(weight, scale, None, dtype), (weight * scale[:, None]).to(dtype))
    power = torch.frexp(scale)[1].sub(1).float().exp2()
    assert torch.equal(widen(weight, scale, None, dtype, False), (weight * power[:, None]).to(dtype))
    for group_size in (352, 32, 22):
        scales = torch.rand(1000, 352 // group_size, device="cuda").to(dtype)
        packed, zeros = pack(weight >> 4), torch.randint(-8, 8, scales.shape, dtype=torch.int8, device="cuda")
        assert torch.equal(widen(*interleave_int4(packed, scales), dtype), dequantize(packed, scales))
        assert torch.equal(widen(*interleave_int4(packed, scales, zeros), dtype), dequantize(packed, scales, zeros))


@dtypes
@pytest.mark.parametrize("rows", [*ROWS, 144, 200, 300, 2047])
@pytest.mark.parametrize(("out", "width"), [(12288, 4096), (22016, 1024), (4096, 11008), (576, 1536)])
def test_w8a8_and_fp8(rows, out, width, dtype):
    from trtbuild.kernels.many_rows import _is_many
    from trtbuild.kernels.processors import processors

    x, bias = torch.randn(rows, width, device="cuda").to(dtype), torch.randn(out, device="cuda").to(dtype)
    weight = torch.randn(out, width, device="cuda") * 0.02
    scale, input_scale = torch.full((out,), 0.001, device="cuda"), torch.full((1,), 0.02, device="cuda")
    integers, narrow = quantize(weight, scale[:, None], torch.int8), quantize(weight, scale[:, None], FP8)
    tolerance = LINEAR_TOLERANCE[dtype]
    rounding = 3e-3 if _is_many(rows, out, processors(x.device)) else 5e-4  # of sums, by tensor cores
    fp8_tolerance = tolerance + rounding
    for constants in ({}, {"bias": bias}):
        constants |= {"scales": scale}
        static = constants | {"input_scale": input_scale}
        check(W8A8Linear("int8", "token"), tolerance, x, weight=integers, **constants)
        check(W8A8Linear("int8", "static"), tolerance, x, weight=integers, **static)
        check(W8A8Linear("fp8", "static"), fp8_tolerance, x, weight=narrow, **static)
        check(W8A8Linear("fp8", "token"), fp8_tolerance, x, weight=narrow, **constants)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("width", [576, 4096, 11008, 28672])
def test_quantized_rows_equal_the_cpus(width, dtype):
    from trtbuild.kernels.quantize_rows import quantize_rows

    x = (torch.randn(7, width) * 3).to(dtype)
    x[2] = 0
    scale = torch.tensor([0.013])
    for name, narrow in DTYPES.items():
        values, scales = quantize_rows(x.cuda(), None, narrow)
        expected, expected_scales = W8A8Linear(name, "token")._quantized(x)
        assert torch.equal(scales.cpu(), expected_scales)
        assert torch.equal(values.float().cpu(), expected.float())
        actual, _ = quantize_rows(x.cuda(), scale.cuda(), narrow)
        assert torch.equal(actual.float().cpu(), quantize(x.float(), scale, narrow).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_scales_of_weights_equal_the_cpus(dtype):
    x = torch.randn(2000, 64).to(dtype).float()
    for narrow in DTYPES.values():
        assert torch.equal(scale_for(x.abs().cuda(), narrow).cpu(), scale_for(x.abs(), narrow))
    for symmetric in (True, False):
        grid = Int4Grid(64, symmetric, torch.float32)
        for actual, expected in zip(grid.round(x.cuda()), grid.round(x), strict=True):
            assert torch.equal(actual.cpu(), expected)


class AttentionCase:
    """Inputs of a step's attention, and what the operations make of them; beyond a sequence's end caches are poisoned.

    `chunks`: tokens and past of every sequence. Sequences have slots in reverse order, or in order.
    """

    def __init__(self, dtype, heads, kv_heads, head_dim, chunks, cache_dtype, position, reverse=False):
        self.heads, self.kv_heads, self.head_dim, self.chunks = heads, kv_heads, head_dim, chunks
        batch, tokens = len(chunks), sum(n for n, _ in chunks)
        self.bound = bound = max(n + past for n, past in chunks)
        integers = {"dtype": torch.int32, "device": "cuda"}
        self.qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device="cuda").to(dtype)
        self.past = torch.tensor([past for _, past in chunks], **integers)
        self.starts = torch.tensor([0, *(n for n, _ in chunks)], **integers).cumsum(0).int()
        self.positions = torch.cat([torch.arange(past, past + n, **integers) for n, past in chunks])
        self.slots = torch.arange(batch, **integers).flip(0) if reverse else torch.arange(batch, **integers)
        self.cos = self.sin = self.factors = self.slopes = None
        if position == "alibi":
            self.slopes = alibi_slopes(heads).cuda()
        else:
            angles = torch.rand(tokens, head_dim, device="cuda") * 7
            self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        if position == "log-n":
            self.factors = (1 + torch.rand(tokens, device="cuda")).to(dtype)
        caches = list(torch.randn(2, batch, kv_heads, bound + 8, head_dim, device="cuda").to(dtype))
        self.scales = None, None
        if cache_dtype:
            self.scales = tuple(torch.rand(2, kv_heads, device="cuda") * 0.02 + 0.01)
            caches = [
                quantize(cache.float(), scale[:, None, None], cache_dtype)
                for cache, scale in zip(caches, self.scales, strict=True)
            ]
        if cache_dtype != torch.int8:
            for cache in caches:
                for slot, (n, past) in zip(self.slots.tolist(), chunks, strict=True):
                    cache[slot, :, past + n :] = float("nan")
        self.before, self.caches, self.pages = [cache.clone() for cache in caches], caches, None

    def part(self, start, end):
        """Of one sequence some tokens, which go on with its caches."""
        part = copy(self)
        for name in ("qkv", "cos", "sin", "factors", "positions"):
            whole = getattr(self, name)
            setattr(part, name, None if whole is None else whole[start:end])
        part.past = torch.full_like(self.past, start)
        part.starts = torch.tensor([0, end - start], dtype=torch.int32, device="cuda")
        return part

    def run(self, dtype):
        """The attended values and the caches in order of sequences, all of it computed in `dtype`."""
        sizes = self.heads, self.kv_heads, self.head_dim
        qkv, *rest = (None if x is None else x.to(dtype) for x in (self.qkv, self.cos, self.sin, self.factors))
        cos, sin, factors = rest
        q, k, v = SplitHeads(*sizes).reference(qkv) if cos is None else Rotate(*sizes).reference(qkv, cos, sin)
        q = q if factors is None else ScaleTokens().reference(q, factors)
        held = [c[self.slots] if self.scales[0] is not None else c[self.slots].to(dtype) for c in self.before]
        inputs = self.positions, self.starts, self.past, *held, self.slopes, *self.scales
        return Attention().reference(q, k, v, *inputs)

    def check(self, output, tolerance):
        """Against float64, and the caches against the operations in the same dtype, bit for bit."""
        expected, *_ = self.run(torch.float64)
        assert (output.double() - expected).norm() / expected.norm() < tolerance
        _, *written = self.run(self.qkv.dtype)
        for cache, wanted in zip(self.caches, written, strict=True):
            assert torch.equal(cache[self.slots].view(torch.uint8), wanted.view(torch.uint8))

    def decode(self):
        from trtbuild.kernels.decode_attention import decode_attention

        step = self.cos, self.sin, self.factors, self.positions, *self.caches, *self.scales, self.slopes
        return decode_attention(self.qkv, *step, self.bound, self.heads, None, self.pages)[0]

    def context(self):
        """The attended values, with some rows of padding."""
        from trtbuild.kernels.context_attention import context_attention, write_cache

        qkv, cos, sin, factors = (
            None if x is None else F.pad(x, (0,) * (2 * x.dim() - 1) + (5,), value=float("nan"))
            for x in (self.qkv, self.cos, self.sin, self.factors)
        )
        caches, positions = (*self.caches, *self.scales), F.pad(self.positions, (0, 5))
        write_cache(qkv, cos, sin, positions, self.starts, self.slots, *caches, self.heads, self.pages)
        where = self.starts, self.past, self.slots, *caches, self.slopes, self.heads, None, self.pages
        return context_attention(qkv, cos, sin, factors, *where)[0][: len(self.qkv)]


half, bfloat = torch.float16, torch.bfloat16
# Every case is compiled: caches and positions where heads have keys of their own and where they share them, then sizes.
attentions = pytest.mark.parametrize(
    ("size", "kind"),
    [
        ((32, 32, 128), (half, None, "rope")),
        ((32, 32, 128), (bfloat, torch.int8, "log-n")),
        ((32, 32, 128), (half, FP8, "alibi")),
        ((64, 8, 128), (bfloat, None, "alibi")),
        ((64, 8, 128), (half, torch.int8, "rope")),
        ((64, 8, 128), (bfloat, FP8, "rope")),  # past 0 shows a step's own values alone
        ((64, 8, 128), (half, FP8, "log-n")),
        ((8, 8, 80), (bfloat, FP8, "log-n")),
        ((9, 3, 64), (half, torch.int8, "alibi")),
        ((20, 1, 96), (half, None, "rope")),
    ],
    ids=str,
)


@attentions
def test_a_generation_steps_attention(size, kind):
    dtype, cache_dtype, position = kind
    for pasts in ([2047], [5, 0, 700, 1023], [*range(3, 1603, 100)], [8191], [*range(64)]):
        case = AttentionCase(dtype, *size, [(1, past) for past in pasts], cache_dtype, position)
        # Keys are rounded before they are quantized, which may take them to the other side of a tie.
        case.check(case.decode(), ATTENTION_TOLERANCE[dtype] * (10 if cache_dtype else 1))


@attentions
def test_the_attention_of_chunks(size, kind):
    dtype, cache_dtype, position = kind
    ragged = [[(1, 200), (130, 0), (0, 0), (65, 70), (64, 64)], [(200, 1000), (1, 1500)]]
    for chunks in ([(1, 0)], [(300, 0)], [(128, 0)] * 4, *ragged):
        case = AttentionCase(dtype, *size, chunks, cache_dtype, position, reverse=True)
        case.check(case.context(), ATTENTION_TOLERANCE[dtype] * (10 if cache_dtype else 1))


@attentions
def test_a_prompt_in_chunks(size, kind):
    """The bits of the prompt at once, though what a chunk finds in the cache and what is new are read elsewhere."""
    dtype, cache_dtype, position = kind
    case = AttentionCase(dtype, *size, [(700, 0)], cache_dtype, position)
    expected, whole = case.context(), case.caches
    for cuts in ([0, 1, 700], [0, 64, 331, 640, 700], [0, 513, 699, 700]):
        case.caches = [cache.clone() for cache in case.before]
        found = [case.part(*cut).context() for cut in itertools.pairwise(cuts)]
        assert torch.equal(torch.cat(found), expected)
        for cache, wanted in zip(case.caches, whole, strict=True):
            assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))


@attentions
@pytest.mark.parametrize("page_size", [32, 48, 64, 256])
def test_pages(page_size, size, kind):
    """The bits of dense caches; other pages are poisoned."""
    dtype, cache_dtype, position = kind
    generated = [(1, past) for past in (5, 0, 700, 1023)], [(1, past) for past in range(3, 1603, 16)]
    for name, chunks in (*(("decode", c) for c in generated), ("context", [(1, 200), (130, 0), (0, 0), (64, 64)])):
        case = AttentionCase(dtype, *size, chunks, cache_dtype, position, reverse=name == "context")
        expected, dense = getattr(case, name)(), case.caches
        by_slot = [chunks[b] for b in case.slots.tolist()]
        lengths = [n + past for n, past in by_slot]
        case.caches, case.pages = in_pages(case.before, lengths, [past for _, past in by_slot], page_size)
        assert torch.equal(getattr(case, name)(), expected)
        for pool, cache in zip(case.caches, dense, strict=True):
            for b, length in enumerate(lengths):
                mine = from_pages(pool, case.pages, b, length)
                assert torch.equal(mine.view(torch.uint8), cache[b, :, :length].view(torch.uint8))


def test_a_pool_of_more_elements_than_32_bits_count():
    """Pages on both sides of 2^31 elements of a cache."""
    pools = [torch.zeros(9100, 32, 64, 128, dtype=FP8, device="cuda") for _ in range(2)]
    for name, chunks in (("decode", [(1, 700), (1, 1023)]), ("context", [(60, 700), (70, 953)])):
        case = AttentionCase(torch.float16, 32, 32, 128, chunks, FP8, "rope")
        small, table = in_pages(case.before, [n + past for n, past in chunks], [past for _, past in chunks], 64)
        expected = getattr(case, name)()
        for pool, pages in zip(pools, small, strict=True):
            pool[torch.arange(len(pages), device="cuda") * 300] = pages
        case.caches, case.pages = pools, table * 300
        assert torch.equal(getattr(case, name)(), expected)


def test_rounded_by_attention():
    from trtbuild.kernels.decode_attention import decode_attention

    scale = torch.full((1,), 0.01, device="cuda")
    for size, pasts in (((32, 32, 128), [5, 700]), ((64, 8, 128), [2000]), ((32, 32, 128), [*range(300)])):
        case = AttentionCase(torch.float16, *size, [(1, past) for past in pasts], FP8, "rope")
        given = case.cos, case.sin, None, case.positions, *case.caches, *case.scales, None, case.bound, case.heads
        for dtype in (FP8, torch.int8):
            narrow, scales = decode_attention(case.qkv, *given, (dtype, scale))
            wanted = quantize(decode_attention(case.qkv, *given)[0].cpu().float(), scale.cpu(), dtype)
            assert torch.equal(narrow.cpu().view(torch.uint8), wanted.view(torch.uint8))
            assert torch.equal(scales, scale.expand(len(pasts), 1))


@pytest.mark.parametrize(("heads", "kv_heads", "cache_dtype"), [(32, 32, None), (32, 4, FP8)], ids=str)
def test_long_and_large_steps(heads, kv_heads, cache_dtype):
    for chunks in ([(3000, 0)], [(2048, 0)] * 2, [(512, 7680)]):
        case = AttentionCase(torch.bfloat16, heads, kv_heads, 128, chunks, cache_dtype, "rope", reverse=True)
        case.check(case.context(), ATTENTION_TOLERANCE[torch.bfloat16] * (10 if cache_dtype else 1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(32, 32), (32, 4)])
def test_other_sequences_change_nothing(heads, kv_heads):
    """Nor does another run, nor a captured graph."""
    for name, chunks in (("decode", [(1, 1500), (1, 700)]), ("context", [(130, 100), (300, 0)])):
        cases = [AttentionCase(torch.float16, heads, kv_heads, 128, chunks, None, "rope") for _ in range(2)]
        one, other = cases
        for mine, its in zip((one.qkv, one.cos, one.sin), (other.qkv, other.cos, other.sin), strict=True):
            its[: chunks[0][0]] = mine[: chunks[0][0]]
        for mine, its in zip(one.caches, other.caches, strict=True):
            its[0] = mine[0]
        outputs = []
        for case in cases:
            run = getattr(case, name)
            expected = run()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = run()
            for _ in range(20):
                graph.replay()
                assert torch.equal(captured[-1], expected[-1])
            outputs.append(expected if name == "decode" else expected[1])
        assert torch.equal(outputs[0][: chunks[0][0]], outputs[1][: chunks[0][0]])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 4096), (16, 5120), (300, 576)])
def test_embedding(tokens, width, dtype):
    from trtbuild.kernels.embedding import embedding

    table = torch.randn(1000, width, device="cuda").to(dtype)
    ids = torch.randint(1000, (tokens,), dtype=torch.int32, device="cuda")
    assert embedding(ids, table).equal(Embedding().reference(ids, table))
    assert embedding(ids, table[250:500], 250).equal(EmbeddingPart(250).reference(ids, table[250:500]))


@pytest.mark.parametrize(("head_dim", "kind"), [(128, "plain"), (80, "per token"), (64, "dynamic")])
def test_rotary_embedding(kind, head_dim):
    from trtbuild.kernels.rotary_embedding import rotary_embedding

    positions = torch.randint(0, 16384, (300,), dtype=torch.int32, device="cuda")
    frequencies, dynamic = 10000.0 ** -(torch.arange(0, head_dim, 2, device="cuda") / head_dim), ()
    if kind == "per token":
        frequencies = frequencies * torch.linspace(0.5, 1, 300, device="cuda")[:, None]
    if kind == "dynamic":
        dynamic = positions + 1, 2.0, 2048
    for dtype in ("float32", "float16", "bfloat16"):
        expected = RotaryEmbedding(dtype, *dynamic[1:]).reference(positions, frequencies, *dynamic[:1])
        actual = rotary_embedding(positions, frequencies, getattr(torch, dtype), *dynamic)
        for x, wanted in zip(actual, expected, strict=True):
            # A power that differs by rounding is multiplied by a position.
            torch.testing.assert_close(x, wanted, rtol=0, atol=2**-7 if dynamic else torch.finfo(x.dtype).eps)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 5e-4), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("rows", [1, 16, 300])
@pytest.mark.parametrize("width", [33, 576, 4096, 11008])
def test_norm_and_swiglu(width, rows, dtype, tolerance):
    """Against float64, outputs poisoned; what is rounded to 8 bits is as the CPU rounds the rest."""
    from trtbuild.kernels.add_rms_norm import norm_rows
    from trtbuild.kernels.swiglu import swiglu

    def poison() -> None:
        """Memory of the results' sizes, freed, so that it is likely theirs."""
        torch.full((rows, width), float("nan"), dtype=dtype, device="cuda").clone()
        torch.full((rows, width), 0x7F, dtype=torch.uint8, device="cuda")

    def narrow_equals_rounded(kernel, values) -> None:
        for (name, narrow), scale in itertools.product(DTYPES.items(), (None, torch.tensor([0.013]))):
            poison()
            actual, scales = kernel((narrow, None if scale is None else scale.cuda()))
            expected, expected_scales = W8A8Linear(name, "token")._quantized(values.cpu(), scale)
            # What is rounded may differ in its last bit from what the kernel returns: few numbers fall on another step.
            wanted = expected.double() * expected_scales
            assert (actual.cpu().double() * scales.cpu() - wanted).norm() / wanted.norm() < 2e-3

    a, b = torch.randn(2, rows, width, device="cuda").to(dtype)
    weight = (1 + 0.2 * torch.randn(width, device="cuda")).to(dtype)
    for addend in (None, b):
        poison()
        total, normed, _ = norm_rows(a, weight, 1e-5, b=addend)
        assert total is None if addend is None else torch.equal(total, a + b)
        wide = (a if total is None else total).double()
        expected = F.rms_norm(wide, (width,), weight.double(), 1e-5)
        assert (normed.double() - expected).norm() / expected.norm() < tolerance
        narrow_equals_rounded(lambda q, b=addend: norm_rows(a, weight, 1e-5, b=b, quantize=q)[1:], normed)
    gate_up = torch.randn(rows, 2 * width, device="cuda").to(dtype)
    gate, up = gate_up.double().chunk(2, -1)
    poison()
    values, _ = swiglu(gate_up)
    expected = F.silu(gate) * up
    assert (values.double() - expected).norm() / expected.norm() < tolerance
    narrow_equals_rounded(lambda q: swiglu(gate_up, q), values)


@dtypes
def test_parts_of_int8_weights_scales(dtype):
    """A product of integers times powers of two, and what follows it, as with the whole scales before."""
    from trtbuild.kernels.add_rms_norm import norm_rows
    from trtbuild.kernels.swiglu import swiglu

    x, weight = (
        torch.randn(300, 512, device="cuda").to(dtype),
        torch.randint(-127, 128, (2048, 512), device="cuda").to(torch.int8),
    )
    scales = torch.rand(2048, device="cuda") * 1e-3
    exact = x.double() @ (weight.double().T * scales)
    y, left = partly_scaled(x, weight, scales)
    assert left is scales
    gate, up = exact.chunk(2, -1)
    expected = F.silu(gate) * up
    tolerance = 2 * LINEAR_TOLERANCE[dtype]
    assert (swiglu(y, weight_scales=left)[0].double() - expected).norm() / expected.norm() < tolerance
    residual, norm = torch.randn_like(y), torch.rand(2048, device="cuda").to(dtype)
    total, _, _ = norm_rows(residual, norm, 1e-5, b=y, b_scales=left)
    assert (total.double() - residual.double() - exact).norm() / exact.norm() < 4 * tolerance  # of a sum, rounded


FEW_ROWS = {  # a format's dtype of weights, and its activations
    "dense": (None, "16bit"),
    "int8": (torch.int8, "16bit"),
    "int4": (torch.uint8, "16bit"),
    "int4_zeros": (torch.uint8, "16bit"),
    "w8a8_token": (torch.int8, "token"),
    "w8a8_static": (torch.int8, "static"),
    "fp8_token": (FP8, "token"),
    "fp8_static": (FP8, "static"),
}


def few_rows_constants(kind: str, out: int, width: int, dtype: torch.dtype) -> tuple[dict, torch.Tensor]:
    """What the kernel takes, and the weight that it stands for, float64."""
    from trtbuild.kernels.widen import interleave_int4

    narrow, activations = FEW_ROWS[kind]
    if narrow is None:
        weight = (torch.randn(out, width, device="cuda") * width**-0.5).to(dtype)
        return {"weight": weight}, weight.double()
    if narrow == torch.uint8:
        packed = pack(torch.randint(-8, 8, (out, width), dtype=torch.int8, device="cuda"))
        group = min(width & -width, 128)
        scales = (torch.rand(out, width // group, device="cuda") * 0.2 * width**-0.5).to(dtype)
        zeros = torch.randint(-8, 8, scales.shape, dtype=torch.int8, device="cuda") if "zeros" in kind else None
        laid = dict(zip(("weight", "scales", "zeros"), interleave_int4(packed, scales, zeros), strict=True))
        return laid, dequantize(packed, scales.double(), zeros)
    scales = (torch.rand(out, device="cuda") + 0.5) / 100 * width**-0.5
    weight = quantize(torch.randn(out, width, device="cuda"), torch.full((1,), 0.03, device="cuda"), narrow)
    constants = {"weight": weight, "scales": scales, "activations": activations}
    if activations == "static":
        constants["input_scale"] = torch.full((1,), 0.02, device="cuda")
    return constants, weight.double() * scales.double()[:, None]


@dtypes
@pytest.mark.parametrize("kind", FEW_ROWS)
@pytest.mark.parametrize(("out", "width"), [(12288, 4096), (4096, 11008), (66, 352), (576, 1536)])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 17, 64, 65, 128, 300])
def test_few_rows(rows, out, width, kind, dtype):
    """With all epilogues and with none; equal bits twice, and for a row among others; NaN stays in its row."""
    from trtbuild.kernels.few_rows import product, takes
    from trtbuild.kernels.quantize_rows import quantize_rows

    constants, wide = few_rows_constants(kind, out, width, dtype)
    activations = constants.get("activations", "16bit")
    x, bias = torch.randn(rows, width, device="cuda").to(dtype), torch.randn(out, device="cuda").to(dtype)
    if not takes(x, constants["weight"], constants.get("scales"), constants.get("zeros"), activations):
        pytest.skip("other kernels are faster")
    seen = x.double()
    if activations != "16bit":
        narrow, scale = quantize_rows(x, constants.get("input_scale"), constants["weight"].dtype)
        seen = narrow.double() * scale.double()
    plain = seen @ wide.T
    gate, up = (plain + bias.double()).chunk(2, -1)
    residual = torch.randn(rows, out // 2, device="cuda").to(dtype)
    poison = torch.full((6, rows, out), float("nan"), device="cuda")
    del poison
    y = product(x, **constants, bias=bias, swiglu=True, residual=residual)
    expected = F.silu(gate) * up + residual.double()
    assert (y.double() - expected).norm() / expected.norm() < 2 * LINEAR_TOLERANCE[dtype]
    y = product(x, **constants, dtype=torch.float32)
    rounded = kind.startswith(("int4", "fp8"))  # a scaled weight of INT4 may be; sums of FP8 products keep 14 bits
    assert (y.double() - plain).norm() / plain.norm() < LINEAR_TOLERANCE[dtype] * (1 if rounded else 0.1)
    assert torch.equal(y, product(x, **constants, dtype=torch.float32))
    others = torch.cat((x[-1:], torch.randn_like(x[1:])))
    assert torch.equal(product(others, **constants, dtype=torch.float32)[0], y[-1])
    if "w8a8" not in kind:  # integers have no NaN
        x[-1, 5] = float("nan")
        z = product(x, **constants, dtype=torch.float32)
        assert z[-1].isnan().all()
        assert torch.equal(z[:-1], y[:-1])


@dtypes
def test_few_rows_after_a_norm(dtype):
    from trtbuild.kernels.few_rows import product

    x, norm = (torch.randn(5, 4096, device="cuda") * 100).to(dtype), torch.rand(4096, device="cuda").to(dtype)
    weight = (torch.randn(1024, 4096, device="cuda") * 0.02).to(dtype)
    expected = F.rms_norm(x.double(), (4096,), norm.double(), 1e-5) @ weight.double().T
    y = product(x, weight, norm=norm, eps=1e-5)
    assert (y.double() - expected).norm() / expected.norm() < 2 * LINEAR_TOLERANCE[dtype]


def test_results_do_not_vary():
    """The same inputs give the same bits, also in a captured graph."""
    op = Int4Linear()
    x = torch.randn(4, 11008, device="cuda").half()
    weight = pack(torch.randint(-8, 8, (4096, 11008), dtype=torch.int8, device="cuda"))  # split sums
    constants = op.prepare(x.device, weight=weight, scales=torch.rand(4096, 86, device="cuda").half())
    expected = op.portable(None, x, **constants)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.portable(None, x, **constants)
    for _ in range(20):
        graph.replay()
        assert torch.equal(captured, expected)


def one_row_layer(kind: str, out: int, width: int, dtype: torch.dtype):
    """Constants of `one_row.product`, and the linear layer in float64."""
    from trtbuild.kernels.widen import interleave_int4

    scales = torch.rand(out, device="cuda") * 0.001
    integers = torch.randint(-128, 128, (out, width), dtype=torch.int8, device="cuda")
    if kind == "16 bits":
        weight = (torch.randn(out, width, device="cuda") * width**-0.5).to(dtype)
        return {"weight": weight}, lambda x: x @ weight.double().T
    if kind == "int8":
        return {"weight": integers, "scales": scales}, lambda x: x @ (integers * scales.double()[:, None]).T
    if kind.startswith("int4"):
        packed = pack(integers >> 4)
        scales = (torch.rand(out, width // (128 if width % 128 == 0 else 32), device="cuda") * 0.01).to(dtype)
        zeros = torch.randint(-8, 8, scales.shape, dtype=torch.int8, device="cuda") if "zeros" in kind else None
        prepared = dict(zip(("weight", "scales", "zeros"), interleave_int4(packed, scales, zeros), strict=True))
        return prepared, lambda x: x @ dequantize(packed, scales.double(), zeros).T
    name, activations = kind.split()
    op = W8A8Linear(name, activations)
    weight = integers if name == "int8" else (torch.randn(out, width, device="cuda") * 50).to(FP8)
    static = torch.full((1,), 0.02, device="cuda") if activations == "static" else None
    constants = {"weight": weight, "scales": scales, "input_scale": static, "activations": activations}

    def linear(x: torch.Tensor) -> torch.Tensor:
        """Rounded on the CPU: on a GPU torch divides by a number as it multiplies with its inverse."""
        narrow, s = op._quantized(x.float().cpu(), None if static is None else static.cpu())
        return narrow.cuda().double() @ weight.double().T * s.cuda() * scales

    return constants, linear


EVERYTHING = "norm bias swiglu residual"
ONE_ROW = [
    # Three tiles or more, the last one in part, and rows that programs do not divide.
    *((torch.float16, kind, 642, 11008, EVERYTHING) for kind in ("16 bits", "int8", "int4", "int4 zeros")),
    *(
        (torch.float16, kind, 642, 11008, EVERYTHING)
        for kind in ("int8 static", "int8 token", "fp8 static", "fp8 token")
    ),
    *((torch.bfloat16, kind, 642, 11008, EVERYTHING) for kind in ("16 bits", "int8", "int4 zeros", "fp8 token")),
    *((torch.float16, kind, 12288, 4096, "norm") for kind in ("int8", "int4", "int8 token")),  # the tiles of many rows
    *((torch.float16, kind, 40, 384, "residual") for kind in ("int4", "int4 zeros")),  # less than a tile, three groups
    (torch.float16, "int4", 34, 96, "residual"),  # groups of 32
    *((torch.float16, kind, 34, 33, "residual") for kind in ("16 bits", "int8 token", "fp8 token")),  # not aligned
]


@pytest.mark.parametrize(("dtype", "kind", "out", "width", "options"), ONE_ROW, ids=str)
def test_one_row(dtype, kind, out, width, options):
    from trtbuild.kernels.one_row import product

    constants, linear = one_row_layer(kind, out, width, dtype)
    x = torch.randn(1, width, device="cuda").to(dtype)
    norm = (torch.rand(width, device="cuda") + 0.5).to(dtype) if "norm" in options else None
    bias = torch.randn(out, device="cuda").to(dtype) if "bias" in options else None
    swiglu = "swiglu" in options
    out = out // 2 if swiglu else out
    residual = torch.randn(1, out, device="cuda").to(dtype) if "residual" in options else None
    expected = linear(x.double() if norm is None else F.rms_norm(x.double(), norm.shape, norm.double(), 1e-5))
    if bias is not None:
        expected = expected + bias.double()
    if swiglu:
        gate, up = expected.chunk(2, -1)
        expected = F.silu(gate) * up
    if residual is not None:
        expected = expected + residual.double()
    options = {"bias": bias, "norm": norm, "eps": 1e-5, "swiglu": swiglu, "residual": residual}
    result = torch.float32 if swiglu else dtype
    only_sums = result == torch.float32 and "int4" not in kind  # in INT4 what was normed is rounded to 16 bits
    tolerance = 5e-4 if only_sums else 2 * LINEAR_TOLERANCE[dtype]
    poison = torch.full((1, out), float("nan"), dtype=result, device="cuda")
    del poison
    actual = product(x, **constants, **options, dtype=result)
    assert actual.dtype == result
    assert (actual.double() - expected).norm() / expected.norm() < tolerance
    assert torch.equal(actual, product(x, **constants, **options, dtype=result))
    x[0, width // 2] = float("nan")
    assert product(x, **constants, **options, dtype=result).isnan().all()
