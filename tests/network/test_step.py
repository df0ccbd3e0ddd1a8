"""What is known of steps without a session."""

import pytest
import torch

from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.decoder.decoder import decoder
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network.step import CAPTURED_ROWS, Chunk, captured_rows, pieces

LLAMA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}


@pytest.mark.parametrize(("sizes", "rows"), [({}, CAPTURED_ROWS[-1]), (LLAMA_7B, 2688)])
def test_how_long_captured_steps_are(tiny_config, sizes, rows):
    """Of LLaMA-7B's layers, 202M weights each, 2^39 products are 2,717 rows."""
    config = config_from_hugging_face(tiny_config | sizes, "test")
    network = decoder(config, dummy_tensors(config, 0, torch.float16).__getitem__, torch.float16, 128)
    assert captured_rows(network) == rows


def test_a_step_in_pieces():
    chunks = [Chunk([1, 2], 2), Chunk([3, 4, 5], 8, past=4, slot=1, all_logits=True), Chunk([6, 7, 8, 9], 4, slot=2)]
    steps = pieces(chunks, 4)
    assert [[list(chunk.tokens) for chunk in step] for step, _ in steps] == [[[1, 2], [3, 4]], [[5], [6, 7, 8]], [[9]]]
    assert [[(chunk.past, chunk.slot) for chunk in step] for step, _ in steps] == [
        [(0, 0), (4, 1)],
        [(6, 1), (0, 2)],
        [(3, 2)],
    ]
    assert [wanted for _, wanted in steps] == [[0, 1, 2], [0], [0]]
    assert pieces(chunks, 9) == [(chunks, [0, 1, 2, 3, 4])]
