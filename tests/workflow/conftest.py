"""Folders in which Snakemake runs for real, with tiny dummy models; a finished one is made once and copied."""

import fcntl
import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from workflow_config import CONFIG
from workspace import Workspace

from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Quantization
from trtbuild.workflow import weights_folder

# Python imports `sitecustomize` in every process. This one stops the job that is about to rename its output, or did,
# until the mark that it has set is removed.
HANG = """
import os, pathlib, time

rename = pathlib.Path.replace

def hang(name, path):
    if os.path.abspath(path) == os.environ.get(name):
        mark = pathlib.Path(os.environ["HANG_MARK"])
        mark.touch()
        while mark.exists():
            time.sleep(0.05)

def replace(self, target):
    hang("HANG_BEFORE", self)  # a folder that makes way for the new one
    hang("HANG_BEFORE", target)
    renamed = rename(self, target)
    hang("HANG_AFTER", target)
    return renamed

pathlib.Path.replace = replace
"""

RECIPES = {"fp32": {"dtype": "float32"}, "bf16": {"dtype": "bfloat16"}}

INT4 = {"dtype": "int4", "group_size": 32}  # the dummy models have 64 and 96 input channels
CALIBRATED = {"calibration": {"samples": 32, "length": 32}}
LENIENT = {"max_perplexity_increase": 1000}  # the perplexity of random weights means nothing
FLOAT16 = {"dtype": "float16"} | LENIENT
W8A8 = {"weights": {"dtype": "int8"}, "activations": {"dtype": "int8", "per": "tensor", "smoothquant": 0.5}}
FP8 = {"weights": {"dtype": "fp8"}, "activations": {"dtype": "fp8"}, "kv_cache": {"dtype": "fp8"}}
QUANTIZED_RECIPES = {
    "int8kv": FLOAT16 | CALIBRATED | {"weights": {"dtype": "int8"}, "kv_cache": {"dtype": "int8"}},
    "gptq": FLOAT16 | CALIBRATED | {"weights": INT4 | {"method": "gptq"}},
    "awq": FLOAT16 | CALIBRATED | {"weights": INT4 | {"method": "awq"}},
    "awq-int8kv": FLOAT16 | CALIBRATED | {"weights": INT4 | {"method": "awq"}, "kv_cache": {"dtype": "int8"}},
    "sq": FLOAT16 | CALIBRATED | W8A8,
    "fp8": FLOAT16 | CALIBRATED | FP8,
}


@pytest.fixture(scope="session")
def dummy_models(tiny_config) -> dict:
    """Two models of one shape and other weights."""
    config = tiny_config | {"max_position_embeddings": 2048}
    return {
        name: {"source": {"dummy": {"config": config, "seed": seed}}, "chat_template": "plain"}
        for name, seed in (("tiny", 1), ("other", 2))
    }


@pytest.fixture
def empty(tmp_path, dummy_models) -> Workspace:
    """A folder in which nothing has been made."""
    return Workspace(tmp_path / "empty", CONFIG, dummy_models, RECIPES)


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[Path], str]], tuple[Path, str]]:
    """A folder that one of pytest's processes makes, and what `make` returned there; others wait for it."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        place = place.parent  # which all of them have

    def folder_of(name: str, make: Callable[[Path], str]) -> tuple[Path, str]:
        folder, said = place / name, place / f"{name}.txt"
        with open(place / f"{name}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not said.exists():
                assert not folder.exists(), f"another process could not make {folder}"
                text = make(folder)
                said.write_text(text, encoding="utf-8")
        return folder, said.read_text(encoding="utf-8")

    return folder_of


@pytest.fixture(scope="session")
def made(once, dummy_models) -> tuple[Workspace, str]:
    """A folder in which `snakemake` alone has run, and what that wrote. Read it, or take `finished`."""
    folder, said = once("made", lambda folder: Workspace(folder, CONFIG, dummy_models, RECIPES).succeed())
    return Workspace(folder, CONFIG, dummy_models, RECIPES), said


@pytest.fixture
def finished(made, tmp_path) -> Workspace:
    """A copy of the folder in which everything has been made."""
    return made[0].copy(tmp_path / "finished")


@pytest.fixture(scope="session")
def made_with_tensorrt(made, once) -> Workspace:
    """As `made`, with TensorRT engines of model `other` besides, and all that depends on them."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("no TensorRT for RTX here")
    config = CONFIG | {
        "build": CONFIG["build"] | {"engines": ["portable", "tensorrt"]},
        "matrix": [{"model": "other", "recipes": ["fp32"]}],
    }

    def workspace(folder: Path) -> Workspace:
        return Workspace(folder, config, made[0].models, made[0].recipes)

    def make(folder: Path) -> str:
        made[0].copy(folder)
        return workspace(folder).succeed()

    return workspace(once("tensorrt", make)[0])


@pytest.fixture
def finished_with_tensorrt(made_with_tensorrt, tmp_path) -> Workspace:
    """A copy of the folder in which a TensorRT engine has been made too."""
    return made_with_tensorrt.copy(tmp_path / "finished")


@pytest.fixture(scope="session")
def published_weights(once, dummy_models) -> dict[str, Path]:
    """Folders of quantized weights as others publish them: of model `tiny`, and of a model with one layer."""
    quantization = Quantization.parse(FLOAT16 | {"weights": INT4})
    config = dummy_models["tiny"]["source"]["dummy"]["config"]

    def make(folder: Path) -> str:
        for name, layers in (("tiny", config["num_hidden_layers"]), ("shallow", 1)):
            source = {"dummy": {"config": config | {"num_hidden_layers": layers}, "seed": 1}}
            make_checkpoint(source, folder / "original")
            quantize(folder / "original", folder / name, quantization, device="cpu")
        return ""

    folder, _ = once("published", make)
    return {name: folder / name for name in ("tiny", "shallow")}


@pytest.fixture(scope="session")
def quantized_targets() -> list[str]:
    """What is made of quantized recipes, and of published weights."""
    scored = ("int8kv/rouge.json", "gptq/gate.json", "sq/gate.json", "fp8/perplexity.json", "published/perplexity.json")
    built = ("awq/engine/config.json", "awq-int8kv/engine/config.json")
    return [f"results/tiny/{name}" for name in (*scored, *built)]


@pytest.fixture(scope="session")
def made_quantized(once, dummy_models, published_weights, quantized_targets) -> tuple[Workspace, str]:
    """A folder in which `quantized_targets` have been made, and what that wrote. Read it, or take `quantized`."""
    recipes = QUANTIZED_RECIPES | {
        name: FLOAT16 | {"quant_checkpoint": {"local": {"path": str(published_weights[weights])}}}
        for name, weights in (("published", "tiny"), ("mistaken", "shallow"))
    }
    given = CONFIG | {"matrix": []}, dummy_models, recipes
    folder, said = once("quantized", lambda folder: Workspace(folder, *given).succeed(*quantized_targets))
    return Workspace(folder, *given), said


@pytest.fixture
def quantized(made_quantized, tmp_path) -> Workspace:
    """A copy of the folder in which `quantized_targets` have been made."""
    return made_quantized[0].copy(tmp_path / "quantized")


@pytest.fixture(scope="session")
def declared(tiny_config) -> tuple[dict, dict, dict]:
    """Configuration, models and recipes to rehearse. The models cannot be fetched; `bare` has no `config` either."""
    config = tiny_config | {"num_hidden_layers": 3, "max_position_embeddings": 2048}
    source = {"local": {"path": "no/where"}}
    models = {"tiny": {"source": source, "config": config}, "bare": {"source": source}}
    recipes = {
        "fp32": {"dtype": "float32"},
        "int8kv": {"dtype": "float16", "weights": {"dtype": "int8"}, "kv_cache": {"dtype": "int8"}},
        "published": {"dtype": "float16", "quant_checkpoint": {"local": {"path": "no/where"}}},
    }
    evaluation = {"max_output_len": 16, "dataset": CONFIG["evaluation"]["dataset"] | {"samples": 3}}
    return (
        CONFIG
        | {
            "matrix": [{"model": "tiny", "recipes": ["int8kv"]}],
            "build": CONFIG["build"] | {"max_output_len": 16},
            "evaluation": CONFIG["evaluation"] | evaluation,
            "benchmark": {"batch_size": 3, "input_len": 8, "output_len": 8, "repeats": 2},
        },
        models,
        recipes,
    )


@pytest.fixture
def fresh(declared, tmp_path) -> Workspace:
    """A folder to rehearse in, in which nothing has been made."""
    return Workspace(tmp_path / "fresh", *declared)


@pytest.fixture(scope="session")
def rehearsed(declared, tmp_path_factory) -> Workspace:
    """A folder after a rehearsal of one recipe. Read it, or take a copy."""
    workspace = Workspace(tmp_path_factory.mktemp("workflow") / "rehearsed", *declared)
    workspace.succeed("results/rehearsal/tiny/int8kv/rouge.json", "./results/rehearsal/tiny/int8kv/benchmark.json")
    return workspace


@pytest.fixture
def kill(tmp_path):
    """Runs `snakemake` until it is about to rename `output` (`when` is after: has done so), then kills it all."""
    started = []

    def run(workspace, output: str, *targets: str, when: str = "before", sent: int = signal.SIGKILL) -> None:
        site, mark = tmp_path / "site", tmp_path / "mark"
        site.mkdir(exist_ok=True)
        mark.unlink(missing_ok=True)
        (site / "sitecustomize.py").write_text(HANG, encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
        environment = {
            "PYTHONPATH": path,
            f"HANG_{when.upper()}": str(workspace.folder / output),
            "HANG_MARK": str(mark),
        }
        with open(tmp_path / "killed.txt", "w", encoding="utf-8") as log:
            process = workspace.begin(log, *targets, **environment)
        started.append(process)
        deadline = time.monotonic() + workspace.seconds
        while not mark.exists():
            assert process.poll() is None, (tmp_path / "killed.txt").read_text()
            assert time.monotonic() < deadline, (tmp_path / "killed.txt").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, sent)
        assert process.wait() == -sent if sent == signal.SIGKILL else process.wait() > 0

    yield run
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def made_from_files(tmp_path_factory, dummy_models) -> Workspace:
    """A folder that holds its model's files, published weights and articles, and what was made of them.

    Read it, or take `from_files`.
    """
    folder = tmp_path_factory.mktemp("workflow") / "files"
    make_checkpoint(dummy_models["tiny"]["source"], folder / "model")
    quantize(folder / "model", folder / "published", Quantization.parse(FLOAT16 | {"weights": INT4}), device="cpu")
    (folder / "articles").mkdir()
    rows = ({"id": str(i), "article": f"{i} news " * 20, "highlights": "news"} for i in range(32))
    (folder / "articles" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calibration = {"calibration": {"samples": 32, "length": 32, "dataset": {"name": "articles", "split": "train"}}}
    recipes = {
        "fp32": {"dtype": "float32"},
        "sq": FLOAT16 | calibration | W8A8,
        "published": FLOAT16 | {"quant_checkpoint": {"local": {"path": "published"}}},
    }
    model = {"source": {"local": {"path": "model"}}, "chat_template": "plain"}
    workspace = Workspace(folder, CONFIG, {"tiny": model}, recipes)
    workspace.config["matrix"] = []
    workspace.succeed(*targets_from_files(workspace))
    return workspace


def targets_from_files(workspace) -> list[str]:
    """An engine, and the weights of every recipe."""
    weights = {weights_folder(workspace.recipe(name)) for name in workspace.recipes} - {"checkpoint"}
    return ["results/tiny/fp32/engine/config.json", *(f"results/tiny/{name}" for name in sorted(weights))]


@pytest.fixture
def from_files(made_from_files, tmp_path) -> Workspace:
    """A copy of the folder in which models, weights and articles are files."""
    return made_from_files.copy(tmp_path / "files")


@pytest.fixture(autouse=True)
def _offline(monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
