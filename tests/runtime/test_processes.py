"""Engines of several ranks in real processes under MPI: what they compute, and that what ends one ends all."""

import json
import socket
import subprocess
import sys

import failures
import pytest
import torch
from processes import SECONDS, TESTS, mpiexec
from typer.testing import CliRunner

from trtbuild.cli import app
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.network.network import Network
from trtbuild.network.ranks import Ranks
from trtbuild.runtime import together
from trtbuild.runtime.open import open_engine
from trtbuild.runtime.ranks import MpiRanks, NcclRanks, _meetings, _peer_memory
from trtbuild.runtime.world import launched, world

HERE = TESTS / "runtime"
FEW = ("llama, 1 KV head", "qwen beyond its length", "baichuan 13b int8kv", "llama torch.bfloat16", "damaged")
FLOAT32 = 1e-5  # of the logits' norm: float32 sums in another order
BUSY = 60  # seconds in which all must have ended, for 10, as other tests have the cores


def check(results: dict) -> None:
    broken, alone, generating, again = results.pop("damaged")
    assert broken == generating == again == alone
    assert "in layer 1, from model.layers.1.mlp.down_proj on" in broken
    for name, result in results.items():
        assert result["vocabulary"], name
        if "torch." in name:  # 16 bits
            assert 0 < result["rounding"] < 1.1 * result["rounding alone"], name
        elif name.endswith((" sq", " fp8", " fp8-dynamic", " int8kv")):
            # A last bit of float32 may decide between two of 8-bit numbers.
            assert result["error"] < 0.1 * result["rounding alone"], name
        else:
            assert result["error"] < FLOAT32, name
            assert result["tokens"], name


@pytest.mark.parametrize(("tp_size", "pp_size", "few"), [(2, 1, FEW), (2, 2, (FEW[1], FEW[2], FEW[-1]))])
def test_some_models_on_ranks(tp_size, pp_size, few):
    """More prompts than a batch has are in pages on ranks of one stage, and on more stages several batches."""
    done = mpiexec(tp_size * pp_size, HERE / "all_ranks.py", tp_size, pp_size, *few)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)
    assert {*results} == {*few}
    check(results)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tp_size", "pp_size", "parts", "count"),
    [(2, 1, ("1/5", "3/5"), 24), (1, 2, ("2/5", "4/5"), 24), (4, 1, ("5/10",), 6), (2, 2, ("10/10",), 6)],
)
def test_every_model_and_recipe(tp_size, pp_size, parts, count):
    """On one layout each, fewer where ranks are more than cores; `all_ranks.py` runs all of them on any."""
    done = mpiexec(tp_size * pp_size, HERE / "all_ranks.py", tp_size, pp_size, *parts)
    assert (done.returncode, done.stderr) == (0, "")
    results = json.loads(done.stdout)
    assert len(results) == count + 1
    check(results)


@pytest.mark.slow
@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (2, 2)])
def test_through_torch_distributed(tp_size, pp_size):
    """As on GPUs, but for NCCL; `tests/gpu/ranks.py` runs that."""
    few = "llama, 1 KV head", "baichuan 13b", "llama torch.bfloat16", "damaged"
    done = mpiexec(tp_size * pp_size, HERE / "all_ranks.py", tp_size, pp_size, "gloo", *few)
    assert (done.returncode, done.stderr) == (0, "")
    check(json.loads(done.stdout))


# The command line


@pytest.fixture(scope="module")
def engines(tiny_checkpoint, tmp_path_factory):
    """Folders of a layout each, by tp_size and pp_size."""
    folder = tmp_path_factory.mktemp("engines")
    for tp_size, pp_size in ((1, 1), (2, 1), (1, 2), (2, 2)):
        build_engine_dir(
            tiny_checkpoint,
            folder / f"{tp_size}{pp_size}",
            model="tiny",
            recipe={"dtype": "float32"},
            limits=BuildLimits(max_batch_size=2, max_input_len=32, max_output_len=16),
            engines=["portable"],
            mapping=Mapping(tp_size, pp_size),
        )
    return lambda *layout: folder / "".join(map(str, layout))


@pytest.fixture
def run(tiny_checkpoint):
    texts = ("--input-text", "Water", "--input-text", "a", "--input-text", "A third one")
    return "--tokenizer-dir", tiny_checkpoint, *texts, "--max-output-len", 9


def test_rank_0_prints_what_one_rank_does(engines, run):
    drawn = "--json", "--temperature", 0.9, "--seed", 5
    words = map(str, ("run", "--engine-dir", engines(1, 1), *run, *drawn))
    alone = CliRunner().invoke(app, [*words], catch_exceptions=False)
    ranks = mpiexec(2, "-m", "trtbuild", "run", "--engine-dir", engines(2, 1), *run, *drawn)
    assert (ranks.returncode, ranks.stderr) == (0, "")
    tokens = [[json.loads(line)["output_ids"] for line in done.stdout.splitlines()] for done in (ranks, alone)]
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 3


COMMANDS = {
    "perplexity": ("--samples", 2),
    "summarize": ("--samples", 2, "--max-output-len", 8),
    "benchmark": ("--input-len", 8, "--output-len", 4, "--repeats", 1, "--json"),
    "verify": ("--runtime", "portable", "--input-text", "Water"),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "layout"), [("perplexity", (2, 2)), ("summarize", (1, 2)), ("benchmark", (2, 1)), ("verify", (1, 2))]
)
def test_every_stage_by_all_layouts(engines, tiny_checkpoint, tmp_path, command, layout):
    """What is written, and once: summaries, perplexity, a table of speeds and of what agrees."""
    options = [*COMMANDS[command]]
    if command != "benchmark":
        options += ["--checkpoint-dir", tiny_checkpoint]
    written = {"one": tmp_path / "one.jsonl", "ranks": tmp_path / "ranks.jsonl"}

    def words(name: str, size: tuple[int, int]) -> list[str]:
        output = ["--output", written[name]] if command == "summarize" else []
        return [*map(str, [command, "--engine-dir", engines(*size), *options, *output])]

    alone = CliRunner().invoke(app, words("one", (1, 1)), catch_exceptions=False)
    done = mpiexec(layout[0] * layout[1], "-m", "trtbuild", *words("ranks", layout))
    assert (alone.exit_code, done.returncode) == (0, 0), alone.output + done.stderr
    if command == "summarize":
        one, several = ([json.loads(line)["output_ids"] for line in file.open()] for file in written.values())
        assert several == one
        assert len(one) == 2
    elif command == "verify":
        assert alone.stdout.count("agrees") == done.stdout.count("agrees") == 1
    else:
        one, several = json.loads(alone.stdout), json.loads(done.stdout)
        if command == "perplexity":
            assert several["perplexity"] == pytest.approx(one["perplexity"], rel=1e-5)
        else:  # of a rank
            assert several["bytes_per_step"] == pytest.approx(one["bytes_per_step"] / 2, rel=0.05)


# What ends one ends all


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    return failures.make(tmp_path_factory.mktemp("failing"))


@pytest.mark.parametrize(
    ("when", "how", "rank"), [("prompt", "killed", 1), ("generation", "memory", 0), ("generation", "raises", 1)]
)
def test_a_rank_that_fails_ends_all(failing, when, how, rank):
    assert failures.run(failures.Case(2, when, how, rank), failing, BUSY)[1] == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        *(case for case in failures.cases(2) if case.when in ("import", "start")),
        *(failures.Case(4, failures.WHEN[1 + (rank + 2) % 3], failures.HOW[rank % 3], rank) for rank in range(4)),
    ],
    ids=str,
)
def test_any_rank_that_fails_ends_all(failing, case):
    """Each of four ranks in some way; `failures.py` does it in each, at every moment, many times."""
    assert failures.run(case, failing, BUSY)[1] == ""


def failed(engine, ranks: int, rank: int, how: str, when: str, run) -> subprocess.CompletedProcess:
    return mpiexec(ranks, HERE / "one_fails.py", rank, how, when, "run", "--engine-dir", engine, *run)


slow = pytest.mark.slow
REFUSED = {
    "version": "it has trtbuild 0.0, rank 0 has ",
    "config": "config.json is not rank 0's; all ranks need the same engine folder",
    "file": "missing.safetensors",
}


@pytest.mark.parametrize(
    "what", ["config", *(pytest.param(name, marks=pytest.mark.slow) for name in ("version", "file"))]
)
def test_ranks_that_are_not_alike(engines, run, what):
    done = failed(engines(2, 1), 2, 1, "", what, run)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: rank 1 on {socket.gethostname()}: ")
    assert REFUSED[what] in line
    assert (done.returncode, done.stdout) == (2, "")


@pytest.mark.slow
def test_a_mistake_is_said_once(engines, run):
    done = mpiexec(2, "-m", "trtbuild", "run", "--engine-dir", engines(2, 1), *run, "--input-text", "")
    assert done.stderr == "error: prompt 3 is empty; give at least one token of text\n"
    assert done.returncode == 2


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "how"), [((1, 1), "without mpiexec"), ((2, 2), "with 'mpiexec -n 4'")])
def test_another_number_of_processes(engines, run, layout, how):
    done = mpiexec(2, "-m", "trtbuild", "run", "--engine-dir", engines(*layout), *run)
    assert done.returncode == 2
    assert done.stderr.endswith(f", 2 processes were started; start it {how}\n")
    assert done.stderr.count("\n") == 1


def test_one_process_of_several_ranks(engines):
    with pytest.raises(UserError, match=r"is an engine of 2 ranks, 1 process was started; .*'mpiexec -n 2 trtbuild"):
        open_engine(engines(1, 2))


def test_a_launcher_of_another_mpi(engines, monkeypatch):
    """As with mpich's processes under Slurm's PMIx: each of them is a world."""
    monkeypatch.setattr(together, "launched", lambda: 2)
    with pytest.raises(UserError, match="the launcher started 2 processes, but each finds itself alone"):
        open_engine(engines(2, 1))


@pytest.mark.parametrize("runtime", ["interpreted", "tensorrt"])
def test_only_portable_engines_have_several_ranks(engines, monkeypatch, runtime):
    monkeypatch.setattr("trtbuild.runtime.open.check_processes", lambda folder, mapping: None)
    with pytest.raises(UserError, match=f"runtime {runtime} runs one rank"):
        open_engine(engines(2, 1), runtime)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 1),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, 1),
        ({"PMI_SIZE": "4", "PMI_RANK": "3"}, 4),
        ({"OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "1"}, 2),
        ({"PMIX_RANK": "0"}, 2),
        ({"PMIX_RANK": "0", "SLURM_STEP_NUM_TASKS": "1"}, 1),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, 1),  # a batch script: srun starts the 8
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "8"}, 8),
    ],
)
def test_what_launchers_say(monkeypatch, environment, count):
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "PMIX_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == count


def test_mpi_is_not_touched_without_a_launcher():
    code = "import sys; from trtbuild.runtime.open import world; assert not world(); assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)


def test_without_mpi4py(monkeypatch):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    world.cache_clear()
    with pytest.raises(UserError, match=r"need mpi4py and MPI .*; 'pip install trtbuild\[mpi\]' brings them"):
        world()
    world.cache_clear()


# GPUs, as far as they can be tested without


class OneOfMany:
    host, rank = "here", 0

    def __init__(self, local_rank: int) -> None:
        self.local_rank = local_rank


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"), [(2, 0, 0), (2, 1, 1), (1, 1, 0)], ids=["first", "second", "its own alone"]
)
def test_every_rank_takes_another_gpu(monkeypatch, visible, local_rank, index):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: type("", (), {"uuid": f"GPU-{i}"}))
    device, place = together._own_gpu(OneOfMany(local_rank))
    assert (str(device), place) == (f"cuda:{index}", f"here GPU-{index}")


def test_two_ranks_on_one_gpu():
    shared = together._shared_gpu(OneOfMany(0), ["a GPU-0", "b GPU-0", "a GPU-1", "b GPU-0"])
    assert shared.startswith("ranks 1 and 3 have one GPU (b GPU-0)")
    assert together._shared_gpu(OneOfMany(0), ["a GPU-0", "b GPU-0"]) is None
    with pytest.raises(UserError, match="torch finds no GPU; give every rank one, or use --device cpu"):
        together._own_gpu(OneOfMany(0))


@pytest.mark.parametrize("without", ["this rank", "another", None])
def test_ranks_look_for_each_others_memory_where_all_have_some(monkeypatch, without):
    """To look waits for all; so they tell each other first."""
    pytest.importorskip("triton")
    from trtbuild.kernels.peer_memory import PeerMemory

    told = []

    def block(size, device):
        if without == "this rank":
            raise torch.OutOfMemoryError("none is left")
        return torch.zeros(size, device=device)

    def all_reduce(x, op, group):
        told.append(x.item())
        x *= without is None

    monkeypatch.setattr(PeerMemory, "block", block)
    monkeypatch.setattr(PeerMemory, "of", lambda group, block: (*told, len(block)))
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 3)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    made = _peer_memory(None, torch.device("cpu"))
    assert (made, told) == {"this rank": (None, [0]), "another": (None, [1]), None: ((1, 3), [1, 1])}[without]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ((2, 1), {(0, 1)}),
        ((1, 2), {(0, 1), (1, 0)}),
        ((2, 2), {(0, 1), (2, 3), (0, 2), (1, 3), (2, 0)}),
        ((1, 3), {(0, 1), (1, 2), (2, 0)}),
        ((4, 2), {(0, 1, 2, 3), (4, 5, 6, 7), (0, 4), (1, 5), (2, 6), (3, 7), (4, 0)}),
    ],
)
def test_who_meets(layout, expected):
    assert {*_meetings(*layout)} == expected


def test_what_ranks_can_do_is_alike():
    for kind in (MpiRanks, NcclRanks):
        assert not kind.__abstractmethods__
        assert issubclass(kind, Ranks)


def test_nobody_else_reads_what_is_summed(engines):
    """Sums are written over what is summed."""
    from trtbuild.engine.portable import read_portable

    network: Network = read_portable(engines(2, 1) / "rank0.safetensors")[0]
    sums = [node.inputs["x"] for node in network.nodes if type(node.op).__name__ == "AllReduce"]
    readers = [name for node in network.nodes for name in node.inputs.values()]
    assert len(sums) == 5
    assert all(readers.count(name) == 1 for name in sums)
