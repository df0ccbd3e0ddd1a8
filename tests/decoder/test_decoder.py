"""The decoder's network."""

import torch

from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.decoder.decoder import decoder
from trtbuild.linear.dense import DenseLinear
from trtbuild.models.families import config_from_hugging_face


def test_rows_that_go_on(tiny_config):
    """All tokens leave keys and values in every layer; of the last, what follows is for the wanted rows alone."""
    config = config_from_hugging_face(tiny_config, "test")
    network = decoder(config, dummy_tensors(config, 0, torch.float16).__getitem__, torch.float16, 64)
    products = [node.outputs[0] for node in network.nodes if isinstance(node.op, DenseLinear)]
    rows = [network.tensors[name].shape[0] for name in products]
    last = ["tokens", "rows", "rows", "rows", "rows"]  # q, k and v; o; gate and up; down; output
    assert rows == ["tokens"] * 4 * (config.num_hidden_layers - 1) + last
