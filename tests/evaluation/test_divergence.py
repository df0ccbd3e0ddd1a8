"""KL divergence and top-1 agreement of an engine and the baseline, whose logits are made anew of its hidden states."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.errors import UserError
from trtbuild.evaluation.divergence import Divergence, OutputProduct, write_hidden_states

ORIGIN = {"source_sha256": "12" * 32, "tokens_sha256": "34" * 32, "engine": "transformers", "dtype": "float32"}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(2, 258, (n,), generator=generator) for n in (70, 5, 90)]


@pytest.fixture
def file(model, tiny_checkpoint, windows, tmp_path):
    """What a baseline writes of these windows: `transformers`' own hidden states."""
    with torch.inference_mode():
        states = [model(ids[None], output_hidden_states=True).hidden_states[-1][0] for ids in windows]
    product = OutputProduct(Checkpoint(tiny_checkpoint), torch.float32, CPU)
    write_hidden_states(tmp_path / "hf.safetensors", states, product, ORIGIN)
    return tmp_path / "hf.safetensors"


def opened(file, checkpoint, **changes) -> Divergence:
    return Divergence(file, Checkpoint(checkpoint), CPU, ORIGIN | {"engine": "portable"} | changes)


def test_equals_the_divergence_of_whole_logits(model, file, tiny_checkpoint, windows):
    """Against torch's `kl_div` of `transformers`' logits, in float64; article 0 is two windows."""
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        theirs = [model(ids[None]).logits[0] for ids in windows]
    ours = [logits + 0.1 * logits.std() * torch.randn(logits.shape, generator=generator) for logits in theirs]
    divergence = opened(file, tiny_checkpoint)
    for article, logits in zip((0, 0, 1), ours, strict=True):
        divergence.add(article, logits)
    result = divergence.result()
    p, q = (torch.cat(logits).double().log_softmax(-1) for logits in (theirs, ours))
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert result["mean_kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert result["p99_kl"] == pytest.approx(np.quantile(kl.numpy(), 0.99), rel=1e-5)
    assert result["top1_percent"] == pytest.approx(100 * (p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert 20 < result["top1_percent"] < 100
    assert result["low"] < result["mean_kl"] < result["high"]
    assert result["baseline"] == {"engine": "transformers", "dtype": "float32"}


def test_of_the_same_logits_it_is_zero(model, file, tiny_checkpoint, windows):
    divergence = opened(file, tiny_checkpoint)
    with torch.inference_mode():
        for ids in windows:
            divergence.add(0, model(ids[None]).logits[0])
    result = divergence.result()
    assert abs(result["mean_kl"]) < 1e-9
    assert (result["top1_percent"], result["low"], result["high"]) == (100, None, None)


def test_hidden_states_alone_are_stored(file, windows, tiny_config):
    with safe_open(file, "pt") as stored:
        assert list(stored.keys()) == ["hidden_states"]
        assert stored.get_slice("hidden_states").get_shape() == [sum(map(len, windows)), tiny_config["hidden_size"]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_sha256": "9" * 64}, r"not comparable: the original model \(source_sha256\)"),
        ({"tokens_sha256": "9" * 64}, "what tokenizer and chat template made of the text"),
        ({"max_input_len": 5}, "not comparable: max_input_len is 5 and None"),
    ],
)
def test_another_model_or_text_is_refused(file, tiny_checkpoint, changes, message):
    with pytest.raises(UserError, match=message):
        opened(file, tiny_checkpoint, **changes)


def test_another_checkpoint_is_refused(file, tiny_config, tmp_path):
    from trtbuild.checkpoint.sources import make_checkpoint

    make_checkpoint({"dummy": {"config": tiny_config, "seed": 2}}, tmp_path / "other")
    with pytest.raises(UserError, match=r"other is not the checkpoint that .*hf\.safetensors was made of"):
        opened(file, tmp_path / "other")


def test_files_that_are_something_else(tiny_checkpoint, file, tmp_path):
    with pytest.raises(UserError, match=r"model\.safetensors holds no hidden states of a baseline"):
        opened(tiny_checkpoint / "model.safetensors", tiny_checkpoint)
    others = {"wide": torch.zeros(3, 65), "numbers": torch.zeros(3, 64, dtype=torch.int32), "flat": torch.zeros(64)}
    for name, states in others.items():
        save_file({"hidden_states": states}, tmp_path / name, {"provenance": json.dumps(ORIGIN)})
        with pytest.raises(UserError, match=f"{name} holds no hidden states of a baseline"):
            opened(tmp_path / name, tiny_checkpoint)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated"):
        opened(file, tiny_checkpoint)


@pytest.mark.parametrize(("value", "message"), [(0.0, "goes on where the text has ended"), (math.nan, "not finite")])
def test_what_is_no_result(file, tiny_checkpoint, tiny_config, windows, value, message):
    divergence = opened(file, tiny_checkpoint)
    rows = sum(map(len, windows)) - (message != "not finite")
    divergence.add(0, torch.full((rows, tiny_config["vocab_size"]), value))
    with pytest.raises(UserError, match=message):
        divergence.result()


def test_a_text_that_goes_on_is_refused(file, tiny_checkpoint, tiny_config, windows):
    divergence = opened(file, tiny_checkpoint)
    logits = torch.zeros(sum(map(len, windows)) + 1, tiny_config["vocab_size"])
    with pytest.raises(UserError, match=r"hf\.safetensors ends before the text does"):
        divergence.add(0, logits)
