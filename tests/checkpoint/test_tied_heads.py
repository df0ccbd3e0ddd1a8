"""Models that say their output head is the embedding, and files that say otherwise: as `transformers` reads them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from published_models import LLAMA, QWEN, llama_tensors, qwen_tensors, write_published
from transformers import AutoModelForCausalLM

from trtbuild.checkpoint.canonical import EMBEDDING, HEAD, Checkpoint
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.engine.config import BuildLimits
from trtbuild.evaluation.baseline import PortableBaseline
from trtbuild.evaluation.hugging_face import HuggingFaceModel

DATA = Path(__file__).parent.parent / "data"
TIED = LLAMA | {"tie_word_embeddings": True}
IDS = [5, 300, 17, 17, 260, 1, 99]
STORED = {
    "own head": lambda tensors: tensors,
    "equal head": lambda tensors: tensors | {HEAD: tensors[EMBEDDING].clone()},
    "head only": lambda tensors: {name: x for name, x in tensors.items() if name != EMBEDDING},
    "embedding only": lambda tensors: {name: x for name, x in tensors.items() if name != HEAD},
}


def logits(folder: Path) -> torch.Tensor:
    return PortableBaseline(folder, "float32", "cpu", None, BuildLimits(1, 16, 1), "").logits(IDS)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("safetensors", [True, False], ids=["linked", "bin"])
def test_as_transformers_reads_it(tmp_path, stored, safetensors):
    """The published folder in transformers is the oracle for our engine, and for the baseline of what we made."""
    tensors = STORED[stored](llama_tensors(TIED))
    folder = write_published(tmp_path / "x", TIED, tensors, shards=1, safetensors=safetensors)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = model(torch.tensor([IDS])).logits[0].detach()
    make_checkpoint({"local": {"path": str(folder)}}, tmp_path / "out")
    for ours in (logits(tmp_path / "out"), HuggingFaceModel(tmp_path / "out", device="cpu").logits(IDS)):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-5)
    if safetensors:  # without a conversion, too
        torch.testing.assert_close(logits(folder), expected, rtol=2e-5, atol=2e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (stored != "own head")
    assert (tmp_path / "out" / "config.json").is_symlink() == (safetensors and stored != "own head")


def test_a_converted_family(tmp_path):
    config = QWEN | {"tie_word_embeddings": True}
    tensors = qwen_tensors(config)
    for name, tied in (("lm_head.weight", False), ("transformer.wte.weight", True)):
        folder = write_published(tmp_path / name, config, tensors, shards=1)
        make_checkpoint({"local": {"path": str(folder)}}, tmp_path / f"{name}.out")
        checkpoint = Checkpoint(tmp_path / f"{name}.out")
        assert checkpoint.config.tie_word_embeddings == tied
        assert checkpoint[EMBEDDING].load().equal(tensors["lm_head.weight" if tied else "transformer.wte.weight"])
        tensors = {key: x for key, x in tensors.items() if key != "transformer.wte.weight"}


@pytest.mark.parametrize("fixture", ["gptqmodel-asym", "llmcompressor-int8"])
def test_a_quantized_model(tmp_path, fixture):
    """Its configuration speaks of the original, whose head it keeps in 16 bits."""
    folder = shutil.copytree(DATA / fixture, tmp_path / "x")
    expected = logits(folder)
    config = json.loads((folder / "config.json").read_text())
    assert not config["tie_word_embeddings"]
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    assert not Checkpoint(folder).config.tie_word_embeddings
    assert logits(folder).equal(expected)
    baseline = HuggingFaceModel(folder, device="cpu").logits(IDS)
    torch.testing.assert_close(baseline, expected, rtol=2e-5, atol=2e-5)
