"""Tests leave no memory to torch's cache, since several processes share one GPU."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    yield
    gc.collect()
    torch.cuda.empty_cache()
