"""The portable engine: its file, what is wrong with files, and that a sequence's result is its own."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import time
import weakref
from contextlib import nullcontext

import pytest
import torch
from numerics import run_reference
from safetensors import safe_open
from safetensors.torch import save_file

from trtbuild import progress
from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.engine import portable
from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits, rank_file, read_config
from trtbuild.engine.portable import METADATA_KEY, PortableEngine, read_portable
from trtbuild.errors import UserError
from trtbuild.linear.dense import DenseLinear
from trtbuild.linear.int4 import Int4Linear
from trtbuild.linear.linear import linear
from trtbuild.network import Network, Op, ops
from trtbuild.network.step import Step, whole_prompts
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import LazyTensor, from_tensor
from trtbuild.tensors.quantized_weight import QuantizedWeight

FILE = "rank0.safetensors"


def open_session(folder) -> PortableSession:
    return PortableSession(PortableEngine.load(folder / FILE))


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture
def copied_engine(tiny_engine, tmp_path):
    """An engine folder that a test may damage."""
    return shutil.copytree(tiny_engine, tmp_path / "engine")


@pytest.mark.parametrize("fails", [False, True])
def test_readers_of_weights_end_with_the_loading(tiny_engine, monkeypatch, fails):
    closed = []
    monkeypatch.setattr(portable._Constants, "close", lambda self: closed.append(self))
    if fails:
        monkeypatch.setattr(PortableEngine, "_plan", lambda self, network, constants: 1 / 0)
    with pytest.raises(ZeroDivisionError) if fails else nullcontext():
        PortableEngine.load(tiny_engine / FILE)
    assert len(closed) == 1


# The file


def test_round_trip(tiny_checkpoint, tiny_engine):
    network, limits = read_portable(tiny_engine / FILE)
    checkpoint = Checkpoint(tiny_checkpoint)
    assert limits == BuildLimits(max_batch_size=4, max_input_len=32, max_output_len=16)
    attention = "model.layers.1.self_attn"
    parts = [checkpoint[f"{attention}.{name}_proj.weight"].load() for name in "qkv"]
    assert torch.equal(network.constants[f"{attention}.qkv_proj.weight"].load(), torch.cat(parts))
    for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight", "lm_head.weight"):
        assert torch.equal(network.constants[name].load(), checkpoint[name].load())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_file_is_safetensors_in_the_recipes_dtype(tiny_checkpoint, tmp_path, dtype):
    """Read with the library: weights rounded to the dtype, everything else in one metadata entry."""
    limits = BuildLimits(2, 8, 8)
    build = {"model": "tiny", "recipe": {"dtype": dtype}, "limits": limits, "engines": ["portable"]}
    build_engine_dir(tiny_checkpoint, tmp_path / "engine", **build)
    name = "model.layers.0.self_attn.o_proj.weight"
    with safe_open(tmp_path / "engine" / FILE, "pt") as file:
        expected = Checkpoint(tiny_checkpoint)[name].load().to(getattr(torch, dtype))
        assert torch.equal(file.get_tensor(name), expected)
        metadata = json.loads(file.metadata()[METADATA_KEY])
    assert metadata["format_version"] == 3
    assert metadata["limits"] == dataclasses.asdict(limits)
    assert read_config(tmp_path / "engine")["outputs"][FILE]["bytes"] == (tmp_path / "engine" / FILE).stat().st_size


def test_weights_are_mapped_not_read(tiny_engine):
    """Two loads share the file's pages, and the mapped file is named in the process's memory map."""
    network, _ = read_portable(tiny_engine / FILE)
    weight = network.constants["lm_head.weight"].load()
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(str(tiny_engine / FILE))]
    assert any(int(start, 16) <= weight.data_ptr() < int(end, 16) for start, end in ranges)
    assert weight.data_ptr() == network.constants["lm_head.weight"].load().data_ptr()


def test_weight_bytes_leave_out_the_embedding_table(tiny_engine):
    """2 layers of qkv 128x64, o 64x64, gate+up 192x64, down 64x96; head 320x64; 5 norms of 64; 8 frequencies."""
    layer = 128 * 64 + 64 * 64 + 192 * 64 + 64 * 96
    assert open_session(tiny_engine).weight_bytes == 4 * (2 * layer + 320 * 64 + 5 * 64 + 8)


def rewrite_metadata(path, content: dict) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, {METADATA_KEY: json.dumps(content)})


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def other_version(path):
    rewrite_metadata(path, {"format_version": 99})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is truncated or not a safetensors file"),
        (lambda path: path.write_bytes(b"no engine"), "is truncated or not a safetensors file"),
        (lambda path: path.unlink(), "missing weights file"),
        (lambda path: save_file({"x": torch.ones(2)}, path), "is a safetensors file but not an engine"),
        (other_version, "has engine format 99, this version reads 3; build it again"),
    ],
    ids=["truncated", "text", "missing", "plain safetensors", "other version"],
)
def test_a_bad_engine_file_is_refused(copied_engine, damage, message):
    damage(copied_engine / FILE)
    with pytest.raises(UserError, match=f"{FILE}.*{message}|{message}.*{FILE}"):
        PortableEngine.load(copied_engine / FILE)


def test_a_long_load_shows_a_bar(tiny_engine, monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", 0.1)
    PortableEngine.load(tiny_engine / FILE)
    assert capsys.readouterr().err == ""
    prepare = DenseLinear.prepare

    def slow(*args, **weights):
        time.sleep(0.1)
        return prepare(*args, **weights)

    monkeypatch.setattr(DenseLinear, "prepare", slow)
    PortableEngine.load(tiny_engine / FILE, show=True)
    lines = capsys.readouterr().err.splitlines()
    percent = [int(re.match(r"rank0\.safetensors to cpu: +(\d+)%", line)[1]) for line in lines]
    assert percent == sorted(percent)
    assert percent[-1] == 100
    assert any(0 < part < 100 for part in percent)


# Weights, as operations want them


@dataclasses.dataclass(frozen=True)
class Transposing(Op):
    """`x @ weight.T`, which wants the weight as `[in, out]`."""

    def infer(self, x, weight):
        return [(x.dtype, (x.shape[0], weight.shape[0]))]

    def reference(self, x, weight):
        return x @ weight.T

    def portable(self, step, x, weight):
        return x @ weight

    def prepare(self, device, weight):
        return {"weight": weight.T.contiguous()}


@pytest.mark.parametrize("plain_first", [True, False])
def test_a_weight_is_laid_anew_for_those_who_want_it(plain_first):
    """An embedding table that is also the head's weight, in whatever order they read it."""
    torch.manual_seed(0)
    network = Network()
    ids, rows = (network.input(name, torch.int32, ("tokens",)) for name in ("ids", "rows"))
    table = network.constant("table", from_tensor(torch.randn(12, 5)))
    x = network.input("x", torch.float32, ("tokens", 5))
    if plain_first:
        x = ops.add(ops.embedding(ids, table), x)
    logits = network.add(Transposing(), x=x, weight=table)
    logits = ops.add(logits, network.add(Transposing(), x=ops.embedding(rows, table), weight=table))
    network.mark_output(logits, "logits")
    inputs = {name: torch.randint(12, (4,), dtype=torch.int32) for name in ("ids", "rows")} | {"x": torch.randn(4, 5)}
    result = PortableEngine(network, BuildLimits(1, 4, 1), torch.device("cpu")).run(None, inputs)
    torch.testing.assert_close(result, run_reference(network, inputs)["logits"])


def test_two_int4_products_of_one_weight(monkeypatch):
    """Laid anew once, by what torch's kernel for a CPU wants."""
    torch.manual_seed(0)
    values, scales = torch.randint(-8, 8, (64, 64), dtype=torch.int8), torch.rand(64, 2).bfloat16() * 0.1
    weight = QuantizedWeight("int4", from_tensor(values), from_tensor(scales), None)
    network = Network()
    hidden = linear(network.input("x", torch.bfloat16, ("tokens", 64)), "product", [weight])
    network.mark_output(linear(hidden, "product", [weight]), "logits")
    assert [type(node.op) for node in network.nodes] == [Int4Linear, Int4Linear]
    prepare, laid = Int4Linear.prepare, []

    def counted(self, device, **constants):
        laid.append(prepare(self, device, **constants))
        return laid[-1]

    monkeypatch.setattr(Int4Linear, "prepare", counted)
    engine = PortableEngine(network, BuildLimits(1, 4, 1), torch.device("cpu"))
    assert len(laid) == 1
    assert laid[0]["scales"].ndim == 3
    inputs = {"x": torch.randn(3, 64).bfloat16()}
    assert error(engine.run(None, inputs), run_reference(network, inputs)["logits"]) < 2e-2


@pytest.mark.parametrize("also_as_it_is", [False, True])
def test_what_nobody_reads_as_it_was_is_freed(also_as_it_is):
    """Before the next weight is loaded; each is loaded once."""
    loads, alive = [], []

    def load() -> torch.Tensor:
        alive.append(sum(known() is not None for known in loads))
        value = torch.ones(4, 4)
        loads.append(weakref.ref(value))
        return value

    network = Network()
    y = network.input("x", torch.float32, ("tokens", 4))
    for name in ("first", "second"):
        weight = network.constant(name, LazyTensor(torch.float32, (4, 4), load))
        y = network.add(Transposing(), x=y, weight=weight)
        y = network.add(DenseLinear(), x=y, weight=weight) if also_as_it_is else y
    network.mark_output(y, "logits")
    engine = PortableEngine(network, BuildLimits(1, 4, 1), torch.device("cpu"))
    assert alive == [0, int(also_as_it_is)]
    assert engine.run(None, {"x": torch.ones(2, 4)}).unique().tolist() == [256 if also_as_it_is else 16]


# The folder


def test_config_lists_files_and_inputs(tiny_engine):
    config = read_config(tiny_engine)
    assert config["model"] == "tiny"
    assert config["recipe"] == {"dtype": "float32"}
    assert config["mapping"] == {"tp_size": 1, "pp_size": 1}
    assert config["limits"] == {"max_batch_size": 4, "max_input_len": 32, "max_output_len": 16}
    assert list(config["outputs"]) == [FILE]
    assert set(config["inputs"]) == {"config.json", "model.safetensors"}


def flip_last_byte(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / FILE).unlink(), f"is incomplete: {FILE} is missing; build the engine again"),
        (lambda folder: flip_last_byte(folder / FILE), f"{FILE} is not the file that was built"),
        (lambda folder: truncate(folder / FILE), f"{FILE} is not the file that was built"),
        (lambda folder: (folder / "config.json").unlink(), "is not an engine folder: it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (lambda folder: shutil.rmtree(folder), "is not an engine folder"),
    ],
    ids=["missing rank", "one byte changed", "truncated", "no config", "bad JSON", "no folder"],
)
def test_a_bad_engine_folder_is_refused(copied_engine, damage, message):
    damage(copied_engine)
    with pytest.raises(UserError, match=message):
        read_config(copied_engine, check=True)


def test_a_checkpoint_is_not_an_engine_folder(tiny_checkpoint):
    with pytest.raises(UserError, match="is not an engine folder"):
        read_config(tiny_checkpoint)


@pytest.mark.parametrize(("kind", "name"), [("portable", "rank3.safetensors"), ("tensorrt", "rank3.engine")])
def test_rank_file(kind, name):
    assert rank_file(3, kind) == name


@pytest.mark.parametrize("field", ["max_batch_size", "max_input_len", "max_output_len"])
def test_limits_are_at_least_one(field):
    with pytest.raises(UserError, match=f"{field} is 0; it must be at least 1"):
        BuildLimits(**{field: 0})


# One step


def test_mask_opens_each_sequences_own_positions():
    positions = torch.tensor([0, 3, 4], dtype=torch.int32)  # of the new tokens
    mask = Step.generation(torch.arange(3), 5).mask(positions, torch.float16)
    no = float("-inf")
    assert (mask.dtype, mask.shape) == (torch.float16, (3, 1, 1, 5))
    assert mask[:, 0, 0].tolist() == [[0, no, no, no, no], [0, 0, 0, 0, no], [0, 0, 0, 0, 0]]


def test_mask_is_made_once_a_step_and_not_where_lengths_are_exact():
    positions = torch.tensor([4, 4], dtype=torch.int32)
    step = Step.generation(torch.arange(2), 5)
    assert step.mask(positions, torch.float32) is step.mask(positions, torch.float32)
    assert Step.generation(torch.arange(2), 5, exact=True).mask(positions, torch.float32) is None


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def test_biases_of_the_context_phase():
    """Of every head, slope * (key - query), minus infinity in the future; a shorter prompt's are their corner."""
    step = Step.of_chunks(whole_prompts([[0] * n for n in [3, 1]]))
    biases = step.alibi(torch.tensor([0, 1, 2, 0], dtype=torch.int32), SLOPES, 2, torch.float32)
    no = float("-inf")
    expected = torch.tensor([[0, no, no], [-1, 0, no], [-2, -1, 0]])
    assert torch.equal(biases, (SLOPES[:, None, None] * expected)[None])


def test_biases_of_the_generation_phase():
    """Of every sequence; head 3 is the second of KV head 1."""
    step = Step.generation(torch.arange(2), 4)
    biases = step.alibi(torch.tensor([3, 1], dtype=torch.int32), SLOPES, 2, torch.float32)
    no = float("-inf")
    assert biases.shape == (2, 2, 2, 4)
    assert biases[0, 1, 1].tolist() == [-3 / 16, -2 / 16, -1 / 16, 0]
    assert biases[1, 0, 1].tolist() == [-1 / 4, 0, no, no]


@pytest.mark.parametrize("step", [Step.of_chunks(whole_prompts([[0] * 3, [0]])), Step.generation(torch.arange(2), 3)])
def test_biases_are_made_once_a_step(step):
    positions = torch.tensor([2, 0], dtype=torch.int32)
    first = step.alibi(positions, SLOPES, 2, torch.float16)
    assert step.alibi(positions, SLOPES, 2, torch.float16) is first
    assert all(stride % 8 == 0 for stride in first.stride()[:-1])


# Sequences


def run(session: PortableSession, prompts: list[list[int]], steps: int = 8) -> torch.Tensor:
    """Logits of the last prompt token and of `steps` greedy decode steps, `[steps + 1, batch, vocab]`."""
    logits = [session.prefill(prompts)]
    for _ in range(steps):
        logits.append(session.decode(logits[-1].argmax(-1).int()).clone())
    return torch.stack(logits)


def random_prompts(*lengths: int) -> list[list[int]]:
    return [torch.randint(320, (n,)).tolist() for n in lengths]


@pytest.mark.parametrize("others", [(5,), (32,), (1, 13), (11, 11, 11), (3, 32, 1)])
def test_batch_and_position_do_not_change_a_sequence(tiny_engine, others):
    """Alone, in a ragged or equal batch, first and last: logits within 1e-5 and the same greedy tokens."""
    prompt, *rest = random_prompts(11, *others)
    session = open_session(tiny_engine)
    alone = run(session, [prompt])[:, 0]
    for position in range(len(rest) + 1):
        batch = [*rest[:position], prompt, *rest[position:]]
        together = run(session, batch)[:, position]
        assert error(together, alone) < 1e-5
        assert torch.equal(together.argmax(-1), alone.argmax(-1))


def test_a_longer_previous_batch_leaves_nothing(tiny_engine):
    """The cache is reused and not cleared: what an earlier batch left there must not be seen."""
    fresh, used = open_session(tiny_engine), open_session(tiny_engine)
    short = random_prompts(3, 9)
    run(used, random_prompts(32, 32, 31, 30), steps=16)
    left = used.cache.buffers["key_cache.0"][:2, :, 20:].abs().amax()
    assert left > 0
    assert torch.equal(run(used, short), run(fresh, short))


def test_decode_equals_prefill_of_the_longer_prompt(tiny_engine):
    """The logits of token n are the same whether it came in the prompt or was decoded: 1e-5 of the norm."""
    session = open_session(tiny_engine)
    prompts = random_prompts(20, 14)
    session.prefill([prompt[:-6] for prompt in prompts])
    for i in range(-6, 0):
        decoded = session.decode(torch.tensor([prompt[i] for prompt in prompts], dtype=torch.int32)).clone()
        fresh = open_session(tiny_engine).prefill([prompt[: len(prompt) + i + 1] for prompt in prompts])
        assert error(decoded, fresh) < 1e-5


def test_overhead_of_a_step(tiny_engine):
    """A step of the 2-layer model is some 25 operations; their dispatch must not become the cost.

    Counted in calls of Python's and torch's functions, 238 or, on a CPU that widens 16-bit weights, 295, since times
    depend on what else a machine does.
    """
    session = open_session(tiny_engine)
    tokens = session.prefill(random_prompts(6)).argmax(-1).int()
    session.decode(tokens)
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(event) if event in ("call", "c_call") else None)
    try:
        session.decode(tokens)
    finally:
        sys.setprofile(None)
    assert 50 < len(calls) < 300


def test_freed_memory_is_kept():
    """Blocks of 6 MB, five at a time, are mapped once; in a process of its own, whose C library knows nothing yet."""
    code = """
import resource, torch
from trtbuild.engine.portable import keep_freed_memory
def step():
    blocks = [torch.zeros(6 << 20, dtype=torch.uint8) for _ in range(5)]
    while blocks:
        del blocks[0]
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
keep_freed_memory()
for _ in range(3):
    step()
before = faults()
for _ in range(20):
    step()
print(faults() - before)
"""
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(found) < 10_000  # 152,960 otherwise
