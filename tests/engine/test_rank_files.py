"""Engine folders of several ranks: what lies in them, and that all ranks' files together are the model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory_of_builds import model
from safetensors import safe_open

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import decoder
from trtbuild.decoder.mapping import Mapping
from trtbuild.decoder.sharding import shard
from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits, read_config
from trtbuild.engine.portable import PortableEngine, read_portable
from trtbuild.errors import UserError
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network import lockstep
from trtbuild.network.ops.collectives import Send
from trtbuild.network.step import Step, step_tensors, whole_prompts
from trtbuild.tensors.lazy import LazyTensor

LIMITS = BuildLimits(max_batch_size=2, max_input_len=16, max_output_len=4)
PUBLISHED = Path(__file__).parents[1] / "data"
PROMPTS = [[5, 300, 7], [1, 159, 160, 319]]
layouts = pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)])
pytestmark = pytest.mark.usefixtures("one_thread")


def build(checkpoint: Path | Checkpoint, folder: Path, mapping: Mapping, **options) -> Path:
    given = {"model": "tiny", "recipe": {"dtype": "float32"}, "limits": LIMITS, "engines": ["portable"]}
    build_engine_dir(checkpoint, folder, mapping=mapping, **given | options)
    return folder


def logits(folder: Path) -> list[torch.Tensor]:
    """Of all tokens of `PROMPTS`, `[7, vocab]`, as each rank of the last stage has them."""
    networks = [read_portable(folder / name)[0] for name in read_config(folder)["outputs"]]
    chunks = whole_prompts(PROMPTS, all_logits=True)
    inputs = []
    for network in networks:
        caches = {name: network.tensors[name] for name in network.states}
        zeros = {name: torch.zeros((len(PROMPTS), *x.shape[1:]), dtype=x.dtype) for name, x in caches.items()}
        inputs.append(step_tensors(chunks, network.inputs) | zeros)
    return [outputs["logits"] for outputs in lockstep.run(networks, inputs) if "logits" in outputs]


def sizes(file: Path) -> dict[str, int]:
    """Bytes of each tensor of a file, read by the library."""
    with safe_open(file, "pt") as tensors:
        return {name: tensors.get_tensor(name).nbytes for name in tensors.keys()}  # noqa: SIM118


@layouts
@pytest.mark.parametrize("use_parallel_embedding", [True, False])
def test_all_ranks_files_are_the_model(tiny_checkpoint, tmp_path, tp_size, pp_size, use_parallel_embedding):
    mapping = Mapping(tp_size, pp_size, use_parallel_embedding=use_parallel_embedding)
    folder = build(tiny_checkpoint, tmp_path / "ranks", mapping)
    config = read_config(folder, check=True)
    assert list(config["outputs"]) == [f"rank{rank}.safetensors" for rank in range(tp_size * pp_size)]
    assert Mapping(**config["mapping"]) == mapping
    (expected,) = logits(build(tiny_checkpoint, tmp_path / "one", Mapping()))
    found = logits(folder)
    assert len(found) == tp_size
    for result in found:
        assert (result - expected).norm() / expected.norm() < 1e-6
    # Every rank has one part in `tp_size` of what ranks share, and all of what they do not.
    shared, whole = sizes(tmp_path / "one" / "rank0.safetensors"), {}
    for name in config["outputs"]:
        for tensor, nbytes in sizes(folder / name).items():
            whole[tensor] = whole.get(tensor, 0) + nbytes
    for tensor, nbytes in shared.items():
        times = tp_size if "norm" in tensor else 1
        if tensor == "rotary.inverse_frequencies":
            times = tp_size * pp_size
        elif tensor in ("model.embed_tokens.weight", "lm_head.weight") and not use_parallel_embedding:
            times = tp_size
        elif "qkv_proj" in tensor and tp_size == 4:  # its two KV heads are each on two ranks: 4 + 4 + 4 heads of 8
            assert whole[tensor] * 8 == nbytes * 12
            continue
        assert whole[tensor] == times * nbytes, tensor


@pytest.mark.parametrize("name", sorted(path.parent.name for path in PUBLISHED.glob("*/config.json")))
def test_of_weights_that_others_quantized(tmp_path, name):
    """Files of AutoAWQ, GPTQModel and llm-compressor. Of a scale a token each rank has its own (tests/decoder)."""
    (expected,) = logits(build(PUBLISHED / name, tmp_path / "one", Mapping()))
    (result,) = logits(build(PUBLISHED / name, tmp_path / "stages", Mapping(1, 2)))
    assert torch.equal(result, expected)
    if name.endswith("act-order"):
        with pytest.raises(
            UserError, match=r"\(desc_act\), which ranks cannot share; use tp_size 1, or weights without"
        ):
            build(PUBLISHED / name, tmp_path / "ranks", Mapping(2))
    elif not name.endswith("dynamic"):
        for result in logits(build(PUBLISHED / name, tmp_path / "ranks", Mapping(2))):
            assert (result - expected).norm() / expected.norm() < 1e-6


@pytest.mark.parametrize(("tp_size", "pp_size"), [(8, 1), (4, 2)])
def test_70b_on_eight_ranks(tp_size, pp_size):
    """LLaMA-2 70B, counted by hand; none of its weights is read."""
    config = config_from_hugging_face(model(scale=1) | {"num_hidden_layers": 80}, "test")

    whole = {
        name: LazyTensor(torch.float16, shape, lambda name=name: pytest.fail(f"{name} is read"))
        for name, shape in config.tensor_shapes().items()
    }
    attention, mlp, table = 2 * 8192 * (8192 + 1024), 3 * 8192 * 28672, 32000 * 8192
    for mapping in Mapping(tp_size, pp_size).ranks:
        share, own, _ = shard(config, whole.__getitem__, None, mapping)
        network = decoder(share, own, torch.float16, 4096, None, mapping)
        shared = 80 // pp_size * (attention + mlp) + table * (mapping.is_first + mapping.is_last)
        norms = 80 // pp_size * 2 * 8192 + 8192 * mapping.is_last
        total = sum(constant.nbytes for constant in network.constants.values())
        assert total == 2 * (shared // tp_size + norms) + 4 * 64  # RoPE's frequencies, float32
        layers = {int(name.split(".")[2]) for name in network.constants if name.startswith("model.layers.")}
        assert layers == {*mapping.layers(80)}
        assert network.tensors[f"key_cache.{min(layers)}"].shape == ("batch", 8 // tp_size, 4096, 128)


def test_a_stage_alone_has_no_logits(tiny_checkpoint, tmp_path, monkeypatch):
    """Nor has it the weights of others; it is prepared and run as every engine."""
    folder = build(tiny_checkpoint, tmp_path / "engine", Mapping(1, 2))
    sent = []
    monkeypatch.setattr(Send, "portable", lambda op, step, x: sent.append(x) or ())
    first, last = (PortableEngine.load(folder / f"rank{rank}.safetensors") for rank in range(2))
    assert [name for name in first.network.constants if "layers.1." in name] == []
    assert [name for name in last.network.constants if "layers.0." in name or "embed" in name] == []
    chunks = whole_prompts(PROMPTS)
    caches = {name: torch.zeros((2, *first.network.tensors[name].shape[1:])) for name in first.network.states}
    assert first.run(Step.of_chunks(chunks), step_tensors(chunks, first.network.inputs) | caches) is None
    assert [tuple(x.shape) for x in sent] == [(7, 64)]


def test_a_rank_that_is_missing(tiny_checkpoint, tmp_path):
    folder = build(tiny_checkpoint, tmp_path / "engine", Mapping(2))
    (folder / "rank1.safetensors").unlink()
    with pytest.raises(UserError, match=r"is incomplete: rank1\.safetensors is missing; build the engine again"):
        read_config(folder)


@pytest.mark.parametrize(
    ("scale", "sources"),
    [
        (2, ["float16", "awq"]),
        pytest.param(1, ["float16", "gptq", "awq", "int4", "int8"], marks=pytest.mark.slow),
    ],
    ids=["half", "70b"],
)
def test_a_rank_holds_its_share_alone(tmp_path, scale, sources):
    """Of the shapes of LLaMA-2 70B, at tp 8, from every layout of weights: files of eight times the size or more."""
    script = Path(__file__).parent / "memory_of_builds.py"
    command = [sys.executable, script, tmp_path, str(scale), "8", *sources]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600).stdout
    results = [json.loads(line) for line in output.splitlines()]
    assert [result["source"] for result in results] == sources
    for result in results:
        assert result["peak"] < 1.5 * result["file"], result


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (
            Mapping(8),
            "tp_size 8 does not divide 4 heads, 2 KV heads and an intermediate_size of 96; use one of 1, 2, 4",
        ),
        (Mapping(1, 3), "pp_size 3 is more than the model's 2 layers"),
    ],
)
def test_refused_before_work(tiny_checkpoint, tmp_path, mapping, message):
    with pytest.raises(UserError) as caught:
        build(tiny_checkpoint, tmp_path / "engine", mapping)
    assert str(caught.value) == message
    assert list(tmp_path.iterdir()) == []
