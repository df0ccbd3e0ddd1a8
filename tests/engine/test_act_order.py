"""A GPTQ model whose groups are of channels that lie anywhere (`desc_act`), from its published files to logits."""

from pathlib import Path

import numpy as np
import pytest
import torch
from published_models import LLAMA, Tensors, llama_tensors, write_published

pytest.importorskip("tensorrt_rtx")

from test_family_logits import transformers_llama
from test_recipes import error, logits

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine, read_portable
from trtbuild.engine.tensorrt import LoweredNetwork
from trtbuild.errors import UserError
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.models.config import PRODUCTS
from trtbuild.runtime.lowered_session import InterpretedSession
from trtbuild.runtime.session import PortableSession

CPU = torch.device("cpu")
LIMITS = BuildLimits(max_batch_size=3, max_input_len=24, max_output_len=8)
CONFIG = LLAMA | {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2}
GROUP = 16
pytestmark = pytest.mark.usefixtures("one_thread")


def words(nibbles: np.ndarray) -> torch.Tensor:
    """`[8 n, m]` to int32 `[n, m]`, the first in the lowest bits."""
    places = 16 ** np.arange(8, dtype=np.int64)
    packed = (nibbles.reshape(-1, 8, nibbles.shape[1]) * places[:, None]).sum(1)
    return torch.from_numpy(packed.astype(np.uint32).view(np.int32))


def gptq(out: int, g_idx: np.ndarray, draw: np.random.Generator) -> tuple[Tensors, torch.Tensor]:
    """GPTQ's tensors of a random weight, and what they mean: `scales[g_idx] * (q - zeros[g_idx])`, float64."""
    width = len(g_idx)
    q = draw.integers(0, 16, (width, out))
    zeros = draw.integers(1, 16, (width // GROUP, out))
    scales = draw.uniform(0.1, 0.3, zeros.shape).astype(np.float16) * np.float16(width**-0.5)
    tensors = {
        "qweight": words(q),
        "qzeros": words(zeros.T - 1).T.contiguous(),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    return tensors, torch.from_numpy((scales.astype(np.float64)[g_idx] * (q - zeros[g_idx])).T.copy())


def publish(folder: Path, apart: str | None = None) -> Tensors:
    """Writes the model; projections that read one input have one order, but for `apart`. Its weights, as they are."""
    draw = np.random.default_rng(0)
    meant = llama_tensors(CONFIG)
    stored = {name: x for name, x in meant.items() if "_proj" not in name}
    for i in range(CONFIG["num_hidden_layers"]):
        for parts in PRODUCTS.values():
            names = [f"model.layers.{i}.{part}" for part in parts]
            g_idx = draw.permutation(np.arange(meant[f"{names[0]}.weight"].shape[1]) // GROUP)
            for name in names:
                order = draw.permutation(g_idx) if name == apart else g_idx
                tensors, meant[f"{name}.weight"] = gptq(len(meant[f"{name}.weight"]), order, draw)
                stored |= {f"{name}.{kind}": tensor for kind, tensor in tensors.items()}
    description = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": True}
    write_published(folder, CONFIG | {"quantization_config": description}, stored, safetensors=True)
    return meant


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its checkpoint, and logits of the weights that the file means, in float64."""
    folder = tmp_path_factory.mktemp("act-order")
    meant = publish(folder / "published")
    make_checkpoint({"local": {"path": str(folder / "published")}}, folder / "checkpoint")
    return folder / "checkpoint", transformers_llama(CONFIG, meant), meant


def test_the_weights(model):
    checkpoint, _, meant = model
    for name, expected in meant.items():
        assert error(Checkpoint(checkpoint).dequantized(name).load(), expected) < 1e-7, name


# Norm of the difference over the norm of all logits.
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 3e-3), ("bfloat16", 2e-2)])
def test_logits(model, tmp_path, dtype, tolerance):
    checkpoint, oracle, _ = model
    build_portable(checkpoint, tmp_path / "engine", getattr(torch, dtype), LIMITS, Mapping())
    network, _ = read_portable(tmp_path / "engine")
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(2, 258, (n,), generator=draw).tolist() for n in (7, 1, 20)]
    new_tokens = torch.randint(2, 258, (4, 3), dtype=torch.int32, generator=draw)
    sequences = [prompt + new_tokens[:, i].tolist() for i, prompt in enumerate(prompts)]
    expected = torch.cat([oracle(sequence, 0) for sequence in sequences])
    for session in PortableSession(PortableEngine(network, LIMITS, CPU)), InterpretedSession(network, LIMITS):
        assert error(torch.cat(logits(session, prompts, new_tokens)), expected) < tolerance
    baseline = HuggingFaceModel(checkpoint, device="cpu")
    assert error(torch.cat([baseline.logits(sequence) for sequence in sequences]), expected) < 1e-6


def test_tensorrt_compiles_it(model, tmp_path):
    build_portable(model[0], tmp_path / "engine", torch.float16, LIMITS, Mapping())
    network, _ = read_portable(tmp_path / "engine")
    assert LoweredNetwork(network, True).build(LIMITS, ["8.9"]).nbytes > network.weight_bytes


@pytest.mark.parametrize(("apart", "beside"), [("self_attn.k", "self_attn.q"), ("mlp.up", "mlp.gate")])
def test_one_product_has_one_order(tmp_path, apart, beside):
    publish(tmp_path / "published", f"model.layers.1.{apart}_proj")
    with pytest.raises(UserError) as caught:
        make_checkpoint({"local": {"path": str(tmp_path / "published")}}, tmp_path / "checkpoint")
    assert str(caught.value) == (
        f"{tmp_path / 'published'}: model.layers.1.{beside}_proj and model.layers.1.{apart}_proj are computed as one "
        "product and must have one order of input channels (desc_act, g_idx)"
    )
    assert not (tmp_path / "checkpoint").exists()
