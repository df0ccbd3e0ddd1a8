"""Every Triton kernel on one GPU at the shapes of LLaMA-7B: checked against its reference, and timed.

    python tests/gpu/kernels.py [--only int4]

Times are of launches in a CUDA graph, over inputs that change so that no weight or cache is still in the L2 cache. The
floor is what the bytes take that must be read, at the bandwidth that a large copy measures; "fp16" is cuBLAS with a
float16 weight, torch's attention (masked, as the portable engine called it) over a float16 cache, or plain torch.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.nn.functional as F

from trtbuild.kernels.add_rms_norm import norm_rows
from trtbuild.kernels.context_attention import context_attention, write_cache
from trtbuild.kernels.decode_attention import decode_attention
from trtbuild.kernels.quantize_rows import quantize_rows
from trtbuild.kernels.swiglu import swiglu
from trtbuild.linear.int4 import Int4Linear
from trtbuild.linear.int8 import Int8Linear
from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.network.ops.rotate import Rotate
from trtbuild.network.step import Step
from trtbuild.tensors.rounding import quantize

SHAPES = {"qkv": (12288, 4096), "o": (4096, 4096), "gate_up": (22016, 4096), "down": (4096, 11008)}
ROWS = (1, 16, 64)
ROTATED_BYTES = 384 << 20  # several times the L2 cache
FP8 = torch.float8_e4m3fn


def copies(nbytes: int) -> int:
    return max(2, math.ceil(ROTATED_BYTES / nbytes))


def microseconds(call: Callable, inputs: Sequence[tuple], repeats: int = 7) -> float:
    """Median time of one call, in a graph that goes through `inputs`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call(*inputs[0])
    torch.cuda.current_stream().wait_stream(stream)
    rounds = math.ceil(20 / len(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for arguments in list(inputs) * rounds:
            call(*arguments)
    times = []
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / (rounds * len(inputs)))
    return statistics.median(times[2:])


def bandwidth() -> float:
    """Bytes a microsecond of large device-to-device copies, reads plus writes."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for _ in range(20):  # not captured: as nodes of a graph copies are slower
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000)
    return 2 * source.numel() / statistics.median(times)


class Table:
    """Rows of the result, printed as they come."""

    def __init__(self) -> None:
        self.bandwidth = bandwidth()
        self.wrong = 0
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {self.bandwidth / 1e6:.2f} TB/s\n")
        print("| kernel           | shape               | rows |      us | floor us | x floor | fp16 us | speedup |")
        print("| ---------------- | ------------------- | ---: | ------: | -------: | ------: | ------: | ------: |")

    def add(self, kernel: str, shape: str, rows: int, us: float, nbytes: int, fp16_us: float, error: float) -> None:
        """`error`, the relative one, counts as wrong from 2e-3."""
        floor = nbytes / self.bandwidth
        times = f"{us:7.1f} | {floor:8.1f} | {us / floor:7.2f} | {fp16_us:7.1f} | {fp16_us / us:7.2f}"
        wrong = not error < 2e-3
        self.wrong += wrong
        note = f" WRONG by {error:.1e}" if wrong else ""
        print(f"| {kernel:16} | {shape:19} | {rows:4} | {times} |{note}", flush=True)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def linear_formats(out: int, width: int) -> dict[str, tuple]:
    """Operation and random constants by name."""

    def int8() -> torch.Tensor:
        return torch.randint(-128, 128, (out, width), dtype=torch.int8, device="cuda")

    def int4() -> dict[str, torch.Tensor]:
        groups = out, width // 128
        values = torch.randint(0, 256, (out, width // 2), dtype=torch.uint8, device="cuda")
        return {"weight": values, "scales": (torch.rand(groups, device="cuda") * 0.1).half()}

    zeros = torch.randint(-8, 8, (out, width // 128), dtype=torch.int8, device="cuda")
    scale, input_scale = torch.rand(out, device="cuda") * 0.01, torch.full((1,), 0.02, device="cuda")
    narrow = quantize(torch.randn(out, width, device="cuda"), input_scale, FP8)
    return {
        "int8": (Int8Linear(), {"weight": int8(), "scales": scale}),
        "int4": (Int4Linear(), int4()),
        "int4 zeros": (Int4Linear(), int4() | {"zeros": zeros}),
        "w8a8 token": (W8A8Linear("int8", "token"), {"weight": int8(), "scales": scale}),
        "w8a8 static": (W8A8Linear("int8", "static"), {"weight": int8(), "scales": scale, "input_scale": input_scale}),
        "fp8 token": (W8A8Linear("fp8", "token"), {"weight": narrow, "scales": scale}),
        "fp8": (W8A8Linear("fp8", "static"), {"weight": narrow, "scales": scale, "input_scale": input_scale}),
    }


def linears(table: Table, only: str) -> None:
    for name, (out, width) in SHAPES.items():
        dense = [torch.randn(out, width, device="cuda").half() for _ in range(copies(2 * out * width))]
        inputs = {rows: torch.randn(rows, width, device="cuda").half() for rows in ROWS}
        fp16 = {rows: microseconds(F.linear, [(x, weight) for weight in dense]) for rows, x in inputs.items()}
        del dense
        for kernel, (op, constants) in linear_formats(out, width).items():
            if only not in kernel:
                continue
            prepared = op.prepare(torch.device("cuda"), **constants)
            nbytes = sum(c.nbytes for c in prepared.values())
            many = [{name: c.clone() for name, c in prepared.items()} for _ in range(copies(nbytes))]
            wide = {name: c.double() if c.dtype == torch.float16 else c for name, c in constants.items()}

            def call(x: torch.Tensor, some: dict[str, torch.Tensor], op=op) -> torch.Tensor:
                return op.portable(None, x, **some)

            for rows, x in inputs.items():
                expected = op.reference(x.double(), **wide)
                wrong = error(call(x, prepared), expected)
                us = microseconds(call, [(x, some) for some in many])
                moved = nbytes + x.nbytes + 2 * rows * out
                table.add(kernel, f"{name} {out}x{width}", rows, us, moved, fp16[rows], wrong)


def attention(table: Table) -> None:
    head_dim = 128
    for heads, kv_heads in ((32, 32), (32, 8)):
        for batch, length in ((1, 256), (1, 2048), (16, 256), (16, 2048)):
            shape = batch, kv_heads, length, head_dim
            count = copies(4 * math.prod(shape))
            dense = [tuple(torch.randn(2, *shape, device="cuda").half()) for _ in range(count)]
            qkv = torch.randn(batch, (heads + 2 * kv_heads) * head_dim, device="cuda").half()
            q = qkv.unflatten(1, (-1, head_dim))[:, :heads]
            position_ids = torch.full((batch,), length - 1, dtype=torch.int32, device="cuda")
            step = Step.generation(torch.arange(batch, device="cuda"), length)

            def plain(keys, values, q=q, step=step, position_ids=position_ids, kv_heads=kv_heads):
                grouped, mask = q.unflatten(1, (kv_heads, -1)), step.mask(position_ids, q.dtype)
                return F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask).flatten(1)

            fp16 = microseconds(plain, dense)
            for kernel, dtype in (("attention fp16", None), ("attention int8", torch.int8), ("attention fp8", FP8)):
                scales = (None, None)
                caches = dense
                if dtype:
                    scales = tuple(torch.rand(2, kv_heads, device="cuda") * 0.02 + 0.01)
                    caches = [
                        tuple(quantize(x.float(), s[:, None, None], dtype) for x, s in zip(pair, scales, strict=True))
                        for pair in dense
                    ]
                call = [(qkv, None, None, None, position_ids, *c, *scales, None, length, heads) for c in caches]
                decode_attention(*call[0])
                keys, values = (
                    x.double() * (s[:, None, None] if dtype else 1) for x, s in zip(caches[0], scales, strict=True)
                )
                expected = F.scaled_dot_product_attention(q.double()[:, :, None], keys, values, enable_gqa=True)
                wrong = error(decode_attention(*call[0])[0], expected.flatten(1))
                us = microseconds(decode_attention, call)
                nbytes = 2 * keys.numel() * caches[0][0].element_size() + 2 * q.nbytes
                table.add(kernel, f"{heads}/{kv_heads} heads, {length}", batch, us, nbytes, fp16, wrong)


def context(table: Table) -> None:
    """A prompt's keys and values into a float16 cache, and causal attention, beside torch's; 32 heads of 128."""
    heads, head_dim = 32, 128
    for batch, length in ((1, 128), (1, 2048), (4, 2048)):
        tokens = batch * length
        integers = {"dtype": torch.int32, "device": "cuda"}
        slots, past = torch.arange(batch, **integers), torch.zeros(batch, **integers)
        starts = torch.arange(batch + 1, **integers) * length
        positions = torch.arange(length, **integers).repeat(batch)
        cos, sin = torch.randn(2, tokens, head_dim, device="cuda").half()
        shape = batch, heads, length, head_dim
        sets = [
            (
                torch.randn(tokens, 3 * heads * head_dim, device="cuda").half(),
                *torch.empty(2, *shape, device="cuda").half(),
            )
            for _ in range(copies(12 * tokens * heads * head_dim))
        ]

        def write(qkv, keys, values, cos=cos, sin=sin, where=(positions, starts, slots)):
            write_cache(qkv, cos, sin, *where, keys, values, None, None, heads)

        def attend(qkv, keys, values, cos=cos, sin=sin, where=(starts, past, slots)):
            return context_attention(qkv, cos, sin, None, *where, keys, values, None, None, None, heads)[0]

        def plain(qkv, keys, values, cos=cos, sin=sin, batch=batch):
            q, *_ = Rotate(heads, heads, head_dim).reference(qkv, cos, sin)
            return of_q(q, keys, values, batch)

        def of_q(q, keys, values, batch=batch):
            q = q.unflatten(0, (batch, -1)).transpose(1, 2)
            return (
                F.scaled_dot_product_attention(q, keys, values, is_causal=True).transpose(1, 2).flatten(0, 1).flatten(1)
            )

        q = torch.randn(tokens, heads, head_dim, device="cuda").half()
        us = microseconds(write, sets)
        table.add("write cache", f"{heads} heads, {length}", batch, us, 8 * tokens * heads * head_dim, us, 0.0)
        wrong = error(attend(*sets[0]), plain(*sets[0]))
        nbytes = 8 * tokens * heads * head_dim
        table.add(
            "context",
            f"{heads} heads, {length}",
            batch,
            microseconds(attend, sets),
            nbytes,
            microseconds(of_q, [(q, *caches) for _, *caches in sets]),
            wrong,
        )


def pages(table: Table) -> None:
    """Steps of as many sequences as a GPU's memory holds, over dense caches and over pages at random places.

    Of LLaMA-7B's heads and of a rank's of two of LLaMA-2 70B; the last column compares with dense caches. Some
    sequences are checked against float64.
    """
    head_dim, heads = 128, 32
    for kv_heads, batch, length in ((32, 16, 2048), (32, 48, 3072), (32, 112, 1152), (32, 768, 192), (4, 256, 1024)):
        positions = torch.full((batch,), length - 1, dtype=torch.int32, device="cuda")
        qkv = torch.randn(batch, (heads + 2 * kv_heads) * head_dim, device="cuda").half()
        random = [torch.randn(batch * kv_heads * length * head_dim, device="cuda", dtype=torch.half) for _ in range(2)]
        for name, dtype in (("fp16", None), ("int8", torch.int8), ("fp8", FP8)):
            scales, held = (None, None), random
            if dtype:
                scales = tuple(torch.rand(2, kv_heads, device="cuda") * 0.02 + 0.01)
                held = [(x * 50).clamp_(-128, 127).to(dtype) for x in random]
            dense_us = math.nan
            for size in (length, *(size for size in (32, 64, 128, 256) if length % size == 0 and size < length)):
                count = batch * length // size
                where = None
                if size < length:
                    where = torch.randperm(count, device="cuda").int().view(batch, -1)
                caches = [x.view(count, kv_heads, size, head_dim) for x in held]
                call = (qkv, None, None, None, positions, *caches, *scales, None, length, heads, None, where)
                output, _ = decode_attention(*call)
                wrong = 0.0
                for b in {0, batch // 3, batch - 1}:
                    own = b if where is None else where[b].long()
                    both = [
                        x[own].view(-1, kv_heads, size, head_dim).transpose(0, 1).flatten(1, 2).double()
                        * (s[:, None, None] if dtype else 1)
                        for x, s in zip(caches, scales, strict=True)
                    ]
                    q = qkv[b, : heads * head_dim].double().view(kv_heads, -1, head_dim)
                    wrong = max(wrong, error(output[b], F.scaled_dot_product_attention(q, *both).flatten()))
                us = microseconds(decode_attention, [call])
                dense_us = us if where is None else dense_us
                kind = "dense" if where is None else f"pages {size}"
                nbytes = sum(x.nbytes for x in caches) + qkv.nbytes + output.nbytes
                table.add(f"{kind} {name}", f"{heads}/{kv_heads} heads, {length}", batch, us, nbytes, dense_us, wrong)


def chunks(table: Table) -> None:
    """Prompts, and a part of a long one, in an FP8 cache: writing it and attention, dense and in pages of 64."""
    heads, head_dim = 32, 128
    scales = tuple(torch.rand(2, heads, device="cuda") * 0.02 + 0.01)
    for batch, length, past in ((1, 2048, 0), (16, 128, 0), (4, 2048, 0), (1, 512, 3584)):
        tokens, end = batch * length, past + length
        integers = {"dtype": torch.int32, "device": "cuda"}
        slots, pasts = torch.arange(batch, **integers), torch.full((batch,), past, **integers)
        starts = torch.arange(batch + 1, **integers) * length
        positions = torch.arange(past, end, **integers).repeat(batch)
        cos, sin = torch.randn(2, tokens, head_dim, device="cuda").half()
        qkv = torch.randn(tokens, 3 * heads * head_dim, device="cuda").half()
        held = [torch.randn(batch * heads * end * head_dim, device="cuda").mul_(50).to(FP8) for _ in range(2)]
        dense, expected = math.nan, None
        for size in (end, 64, 256):
            if size > end:
                continue
            where = None if size == end else torch.randperm(batch * end // size, device="cuda").int().view(batch, -1)
            caches = [x.clone().view(-1, heads, size, head_dim) for x in held]
            if where is not None and expected is not None:  # what the dense caches hold, in pages
                for pool, x in zip(caches, held, strict=True):
                    parts = x.view(batch, heads, -1, size, head_dim).transpose(1, 2).reshape(-1, heads, size, head_dim)
                    pool[where.flatten().long()] = parts

            held_at = slots, *caches, *scales
            written = qkv, cos, sin, positions, starts, *held_at, heads, where
            attended = qkv, cos, sin, None, starts, pasts, *held_at, None, heads, None, where
            write_cache(*written)
            output, _ = context_attention(*attended)
            expected = output if where is None else expected
            shape = f"{length} after {past}, {'dense' if where is None else size}"
            us = microseconds(write_cache, [written])
            table.add("write fp8", shape, batch, us, tokens * heads * head_dim * 6, us, 0.0)
            us = microseconds(context_attention, [attended])
            dense = us if where is None else dense
            wrong = error(output, expected)
            table.add("context fp8", shape, batch, us, tokens * heads * head_dim * 6, dense, wrong)


def quantization(table: Table) -> None:
    one, token = torch.full((1,), 0.02, device="cuda"), W8A8Linear("int8", "token")
    for rows, width in ((1, 4096), (16, 4096), (16, 11008), (2048, 4096)):
        xs = [
            torch.randn(rows, width, device="cuda").half() for _ in range(copies(2 * rows * width) if rows > 16 else 4)
        ]
        for kernel, scale, dtype in (
            ("rows to int8", None, torch.int8),
            ("to int8", one, torch.int8),
            ("to fp8", one, FP8),
        ):

            def plain(x, scale=scale, dtype=dtype):
                return token._quantized(x) if scale is None else quantize(x.float(), scale, dtype)

            expected = token._quantized(xs[0])[0] if scale is None else plain(xs[0])
            wrong = error(quantize_rows(xs[0], scale, dtype)[0], expected)
            us = microseconds(quantize_rows, [(x, scale, dtype) for x in xs])
            table.add(kernel, f"{width}", rows, us, 3 * rows * width, microseconds(plain, [(x,) for x in xs]), wrong)


def fusion(table: Table) -> None:
    """Kernels that replace chains of operations, beside torch's kernels for these."""

    def norm(a, b, weight):
        total = a + b
        return total, F.rms_norm(total, weight.shape, weight, 1e-5)

    def fused_norm(a, b, weight):
        return norm_rows(a, weight, 1e-5, b=b)

    def gated(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    for rows in (*ROWS, 2048):
        for width in (4096, 8192):
            count, weight = copies(8 * rows * width) if rows > 64 else 4, torch.rand(width, device="cuda").half() + 0.5
            call = [(*torch.randn(2, rows, width, device="cuda").half(), weight) for _ in range(count)]
            expected = norm(*(x.double() for x in call[0]))
            wrong = max(map(error, fused_norm(*call[0])[:2], expected))
            us = microseconds(fused_norm, call)
            table.add("add, norm", f"{width}", rows, us, 8 * rows * width, microseconds(norm, call), wrong)
        for width in (11008, 28672):
            count = copies(6 * rows * width) if rows > 64 else 4
            call = [(torch.randn(rows, 2 * width, device="cuda").half(),) for _ in range(count)]
            wrong = error(swiglu(*call[0])[0], gated(call[0][0].double()))
            us = microseconds(swiglu, call)
            table.add("swiglu", f"{width}", rows, us, 6 * rows * width, microseconds(gated, call), wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a part of a kernel's name")
    only = parser.parse_args().only
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    table = Table()
    if any(only in kernel for kernel in linear_formats(128, 128)):
        linears(table, only)
    if only in "attention":
        attention(table)
    if only in "context":
        context(table)
    if only in "pages":
        pages(table)
    if only in "chunks":
        chunks(table)
    if only in "quantization":
        quantization(table)
    if only in "fusion":
        fusion(table)
    if table.wrong:
        sys.exit(f"{table.wrong} results are wrong")


if __name__ == "__main__":
    main()
