"""What GPUs do not have and the interpreter does: FP8 on older ones, shared memory, large grids."""

import pytest
import torch

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild import kernels
from trtbuild.kernels import cache, context_attention, few_rows, one_row

FP8 = torch.float8_e4m3fn
GRID = 65535  # of a launch's second and third dimensions


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 9), True)])
def test_fp8(capability, has, monkeypatch):
    """Where there is none nothing takes it; INT8 is everywhere."""
    kernels.capability.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    gpu = torch.device("cuda")
    assert kernels.has_type(gpu, FP8) is has
    assert kernels.has_type(gpu, torch.int8)
    kernels.capability.cache_clear()
    for module in (cache, few_rows, one_row):
        monkeypatch.setattr(module, "has_type", lambda device, dtype: kernels.has_type(gpu, dtype))
    x, scales = torch.zeros(1, 64).half(), torch.ones(32)
    for dtype in (FP8, torch.int8):
        weight = torch.zeros(32, 64).to(dtype)
        expected = has or dtype != FP8
        assert cache.takes(x, 64, weight) is expected
        assert one_row.takes(x, weight, scales, None, "token") is expected
        assert few_rows.takes(x, weight, scales, None, "token") is expected
    kernels.capability.cache_clear()


@pytest.mark.parametrize("kilobytes", [99, 163, 227])
def test_shared_memory(kilobytes, monkeypatch):
    """Of RTX 40, A100 and H100: a program's steps ahead fit, and are at least two."""
    monkeypatch.setattr(few_rows, "shared_memory", lambda device: kilobytes << 10)
    for rows in (2, 32, 64, 128):
        x = torch.empty(rows, 4096, dtype=torch.float16)
        for dtype in (torch.float16, torch.int8, torch.uint8)[rows > few_rows.MAX_ROWS["16bit"] :]:
            weight, block = torch.empty(0, dtype=dtype), 128 if dtype == torch.uint8 else None
            for swiglu in (False, True):
                tiles = few_rows._fitting(few_rows._tiles(x, weight, swiglu, block), x, weight, swiglu)
                assert tiles.stages * few_rows._bytes_of_step(tiles, x, weight, swiglu) <= kilobytes << 10
                assert tiles.stages > 1


def test_grid(monkeypatch):
    """A step may have more tokens than a grid's second dimension has places."""
    grids = []
    launch = type("Launch", (), {"__getitem__": lambda self, grid: grids.append(grid) or (lambda *_, **__: None)})()
    monkeypatch.setattr(context_attention, "_cache_write_kernel", launch)
    monkeypatch.setattr(context_attention, "_context_attention_kernel", launch)
    tokens = GRID + 1
    starts, one = torch.tensor([0, tokens], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    keys = values = torch.empty(1, 1, 8, 8, dtype=torch.float16)
    qkv = torch.empty(tokens, 24, dtype=torch.float16)
    context_attention.write_cache(qkv, None, None, one, starts, one, keys, values, None, None, 1)
    context_attention.context_attention(qkv, None, None, None, starts, one, one, keys, values, None, None, None, 1)
    assert len(grids) == 2
    assert all(max(grid[1:], default=1) <= GRID for grid in grids)
