"""How many cache positions a captured step reads: all that it needs, few more, and few different numbers of them."""

import pytest
import torch

from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.decoder.decoder import decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.models.families import config_from_hugging_face
from trtbuild.runtime.session import PortableSession, kv_bound

LENGTHS = [*range(1, 5000), *(2**i + j for i in range(13, 21) for j in (-1, 0, 1))]


@pytest.mark.parametrize(
    ("length", "bound"),
    [(1, 256), (255, 256), (256, 256), (257, 512), (512, 512), (513, 768), (4095, 4096), (4096, 4096), (4097, 4608)],
)
def test_values(length, bound):
    assert kv_bound(length, 10**6) == bound


def test_every_position_is_read_and_few_more():
    """Too few would leave tokens out of attention; beyond 256 positions at most an eighth is read for nothing."""
    for length in LENGTHS:
        bound = kv_bound(length, 10**7)
        assert length <= bound < length + max(256, length / 8 + 1)
        assert bound % 256 == 0


@pytest.mark.parametrize("max_length", [1, 48, 256, 257, 1000, 4100])
def test_no_more_than_the_cache_holds(max_length):
    for length in range(1, max_length + 1):
        assert kv_bound(length, max_length) == min(kv_bound(length, 10**7), max_length)
    assert kv_bound(max_length, max_length) == max_length


def test_a_sequence_that_grows_needs_few_graphs():
    bounds = [kv_bound(length, 2**17) for length in range(1, 2**17 + 1)]
    assert bounds == sorted(bounds)
    assert len(set(bounds)) == 56  # 16 up to 4096, and 8 for every doubling to 131072


class Replayed(PortableSession):
    """Generation steps as on CUDA, with a bound, but run instead of replayed."""

    def _positions_read(self) -> tuple[int, bool]:
        self.bounds.append(kv_bound(max(self.lengths), self.limits.max_length))
        return self.bounds[-1], False


@pytest.mark.parametrize("positions", [{}, {"trtbuild": {"family": "baichuan", "position_embedding": "alibi"}}])
@pytest.mark.usefixtures("one_thread")
def test_steps_across_a_bound(tiny_config, positions):
    """A captured step gives the logits of the exact one, before, at and after the position where its bound changes."""
    config = config_from_hugging_face(tiny_config | positions, "test")
    limits = BuildLimits(max_batch_size=2, max_input_len=260, max_output_len=8)
    network = decoder(config, dummy_tensors(config, 3, torch.float32).__getitem__, torch.float32, limits.max_length)
    engine = PortableEngine(network, limits, torch.device("cpu"))
    exact, tested = PortableSession(engine), Replayed(engine)
    tested.bounds = []
    prompts = [torch.randint(2, 258, (n,)).tolist() for n in (253, 9)]
    tokens = exact.prefill(prompts).argmax(-1).int()
    tested.prefill(prompts)
    for _ in range(6):
        expected, actual = exact.decode(tokens), tested.decode(tokens)
        assert (actual - expected).norm() < 1e-5 * expected.norm()
        tokens = expected.argmax(-1).int()
    assert tested.bounds == [256, 256, 256, 268, 268, 268]  # 254, 255, 256 positions; then all that there are
