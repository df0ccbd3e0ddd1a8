"""Whole steps by the kernels of a GPU, interpreted: tiny models of every format, float16, against the operations."""

import dataclasses

import numpy as np
import pytest
import torch
from numerics import relative_error
from published_models import TINY
from rounded_weights import rounded

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild import kernels
from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.engine import portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.fusion import Fused
from trtbuild.engine.portable import PortableEngine
from trtbuild.linear.linear import Weight
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network import Network
from trtbuild.network.step import Chunk
from trtbuild.runtime import session
from trtbuild.runtime.paged_steps import Sizes
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import from_tensor

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of numpy, by the interpreter
]

CPU = torch.device("cpu")
LIMITS = BuildLimits(max_batch_size=3, max_input_len=12, max_output_len=4)
SMALL = {"vocab_size": 24, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
FAMILIES = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": True},
    "qwen": {"num_attention_heads": 2, "trtbuild": {"family": "qwen", "ntk_length": 4, "logn_length": 4}},
    "alibi": {"num_attention_heads": 3, "trtbuild": {"family": "baichuan", "position_embedding": "alibi"}},
}
CASES = {  # a family, how weights are rounded, the cache's dtype
    "fp16": ("llama", None, None),
    "int8": ("qwen", "int8 16bit", torch.int8),
    "int4": ("llama", "int4 asymmetric", None),
    "int4, act order": ("llama", "int4 symmetric, reordered", None),
    "w8a8": ("alibi", "int8 token", None),
    "w8a8, static": ("llama", "int8 static", torch.int8),
    "fp8": ("qwen", "fp8 static", torch.float8_e4m3fn),
}


def made(name: str) -> Network:
    """A case's network."""
    family, kind, cache_dtype = CASES[name]
    kind, _, reordered = (kind or "").partition(", ")
    heads = FAMILIES[family]["num_attention_heads"]
    layers = {"num_hidden_layers": 2 if kind is None else 1}
    config = config_from_hugging_face(TINY | SMALL | layers | {"num_key_value_heads": heads} | FAMILIES[family], "test")
    tensors = {name: x.load().half() for name, x in dummy_tensors(config, 3, torch.float32).items()}

    def weights(name: str) -> Weight:
        if not (kind and name.endswith("_proj.weight")):
            return from_tensor(tensors[name])
        weight = rounded(tensors[name].float(), kind, 32, torch.float16)
        order = torch.randperm(tensors[name].shape[1], generator=torch.Generator().manual_seed(0)).int()
        return dataclasses.replace(weight, order=from_tensor(order)) if reordered else weight

    scales = torch.full((config.num_hidden_layers, config.num_key_value_heads), 0.02)
    cache = CacheScales(cache_dtype, scales, scales * 1.5) if cache_dtype else None
    return decoder(config, weights, torch.float16, LIMITS.max_length, cache)


@pytest.fixture
def interpreted(monkeypatch):
    """Makes a session whose engine runs kernels on the CPU, and never the operations in the place of one."""
    monkeypatch.setattr(portable, "FEW_ROWS", 2)
    monkeypatch.setattr(session, "CAPTURED_ROWS", (2, 4))

    def make(network: Network) -> PortableSession:
        monkeypatch.setattr(kernels, "run_on", lambda device: True)
        return PortableSession(PortableEngine(network, LIMITS, CPU))

    def refused(op: Fused, *arguments: object) -> None:
        raise AssertionError(f"no kernel took {op}")

    monkeypatch.setattr(Fused, "chain", refused)
    yield make
    monkeypatch.undo()


def logits(tested: PortableSession) -> torch.Tensor:
    """Of a step of many rows, padded, a generation step, one of few rows that go on in another slot, one row's, and
    generation steps of many rows."""
    rows = [tested.prefill([[3, 1], [4]]), tested.decode(torch.tensor([7, 8]).int())]
    rows.append(tested.step([Chunk([5, 9], 2, past=2, slot=1)]))
    rows += [tested.prefill([[2]]), tested.decode(torch.tensor([6]).int())]
    rows += [tested.prefill([[2], [5], [1]]), tested.decode(torch.tensor([6, 1, 7]).int())]
    return torch.cat([x.clone() for x in rows])


# Norm of the difference from the operations in float16, over the norm of all logits. To FP8 the interpreter cuts off.
TOLERANCES = {"int8 token": 4e-3, "fp8 static": 8e-2}


@pytest.mark.parametrize("name", CASES)
def test_steps(interpreted, name):
    expected = logits(PortableSession(PortableEngine(made(name), LIMITS, CPU)))
    actual = logits(interpreted(made(name)))
    assert relative_error(actual, expected) < TOLERANCES.get(CASES[name][1], 1e-3)


def logits_over_pages(tested: PortableSession) -> torch.Tensor:
    """Of steps of 1, 3 and 2 chunks, padded to 2 and 4; prompts of 4 and 3 tokens come in two."""
    tested.paged("open", Sizes(pages=12, page_size=4, rows=3, width=4, kind=SamplingParams().kind))
    pages = np.random.default_rng(0).permutation(np.arange(1, 13, dtype=np.int32)).reshape(3, 4)
    rows = [tested.paged("chunks", [Chunk([3, 1, 5], 4)], pages[:1]).clone()]
    later = [Chunk([9], 4, past=3), Chunk([4], 3, slot=1), Chunk([2], 1, slot=2)]
    rows.append(tested.paged("chunks", later, pages).clone())
    last = [Chunk([7, 6], 3, past=1), Chunk([8], 1, past=1, slot=1)]
    rows.append(tested.paged("chunks", last, pages[1:]).clone())
    return torch.cat(rows)


@pytest.mark.parametrize("name", CASES)
def test_steps_over_pages(interpreted, monkeypatch, name):
    expected = logits_over_pages(PortableSession(PortableEngine(made(name), LIMITS, CPU)))
    monkeypatch.setattr(session, "PAGED_CHUNKS", 2)
    tested = interpreted(made(name))
    actual = logits_over_pages(tested)
    assert {key[2:] for key in tested._seen} == {(4, 2), (4, 4)}
    assert {key[:2] for key in tested._seen} == {("pages", "chunks")}
    assert relative_error(actual, expected) < TOLERANCES.get(CASES[name][1], 1e-3)
