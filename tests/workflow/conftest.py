"""Folders in which Snakemake runs for real, with tiny dummy models; a finished one is made once and copied."""

import copy
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
# Every job computes in one thread, so that two run at a time and results are equal to the last bit.
ONE_THREAD = ("summarize", "summarize_hf", "perplexity", "perplexity_hf", "benchmark", "portable_engine")

CONFIG = {
    "models": "config/models.yaml",
    "recipes": "config/recipes.yaml",
    "matrix": [{"model": "tiny", "recipes": ["fp32", "bf16"]}, {"model": "other", "recipes": ["fp32"]}],
    "build": {
        "engines": ["portable"],
        "max_batch_size": 4,
        "max_input_len": 1024,
        "max_output_len": 8,
        "remove_input_padding": True,
        "compute_capabilities": ["8.9"],
    },
    "evaluation": {
        "runtime": "portable",
        "device": "cpu",
        "baseline_dtype": "float32",
        "dataset": {"name": "trtbuild-news", "split": "evaluation", "samples": 2},
        "prompt": "{article}",
        "chat": False,
        "max_output_len": 8,
    },
    "benchmark": {"batch_size": 1, "input_len": 8, "output_len": 4, "repeats": 1},
}
RECIPES = {"fp32": {"dtype": "float32"}, "bf16": {"dtype": "bfloat16"}}


class Workspace:
    """A working folder of the workflow: `config`, `models` and `recipes` are written before every run."""

    def __init__(self, folder: Path, config: dict, models: dict, recipes: dict) -> None:
        self.folder = folder
        self.config, self.models, self.recipes = (copy.deepcopy(part) for part in (config, models, recipes))

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def copy(self, folder: Path) -> "Workspace":
        """Results, Snakemake's records and all times included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workspace(folder, self.config, self.models, self.recipes)

    def command(self, *arguments: str) -> list[str]:
        """The command line, after writing the configuration that does not exist yet or that changed."""
        config = self.folder / "config"
        config.mkdir(parents=True, exist_ok=True)
        for name in ("config", "models", "recipes"):
            value = getattr(self, name)
            if value is not None:
                text = value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False)
                (config / f"{name}.yaml").write_text(text, encoding="utf-8")
        program = [sys.executable, "-m", "snakemake", "-s", str(REPOSITORY / "Snakefile")]
        program += ["--directory", str(self.folder), "--profile", str(REPOSITORY / "profiles" / "default")]
        return [*program, "--cores", "2", *arguments, "--set-threads", *(f"{rule}=1" for rule in ONE_THREAD)]

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        """Runs `snakemake`; `stdout` of the result holds what it wrote to either stream."""
        return subprocess.run(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            timeout=300,
        )

    def succeed(self, *arguments: str) -> str:
        """Runs `snakemake`, which has to exit 0, and returns what it wrote."""
        result = self.run(*arguments)
        assert result.returncode == 0, result.stdout
        return result.stdout

    def fail(self, *arguments: str) -> str:
        """Runs `snakemake`, which has to fail without any traceback, and returns what it wrote."""
        result = self.run(*arguments)
        assert result.returncode != 0, result.stdout
        assert "Traceback" not in result.stdout, result.stdout
        return result.stdout

    def pending(self, *arguments: str) -> set[str]:
        """What a run would do: `rule model/recipe` of every job, from a dry run."""
        output = self.succeed("--dry-run", *arguments)
        jobs = set()
        for block in re.split(r"^(?=(?:local)?rule \w+:$)", output, flags=re.MULTILINE)[1:]:
            rule = re.match(r"(?:local)?rule (\w+):", block)[1]
            if wildcards := re.search(r"^    wildcards: (.*)$", block, re.MULTILINE):
                values = dict(item.split("=", 1) for item in wildcards[1].split(", "))
                folder = values.get("recipe") or values.get("run")
                jobs.add(" ".join([rule, "/".join(filter(None, (values["model"], folder)))]))
        assert jobs or "Nothing to be done" in output, output
        return jobs


@pytest.fixture(scope="session")
def dummy_models(tiny_config) -> dict:
    """Two models of one shape and other weights."""
    config = tiny_config | {"max_position_embeddings": 2048}
    return {name: {"source": {"dummy": {"config": config, "seed": seed}}} for name, seed in (("tiny", 1), ("other", 2))}


@pytest.fixture
def empty(tmp_path, dummy_models) -> Workspace:
    """A folder in which nothing has been made."""
    return Workspace(tmp_path / "empty", CONFIG, dummy_models, RECIPES)


@pytest.fixture(scope="session")
def made(tmp_path_factory, dummy_models) -> tuple[Workspace, str]:
    """A folder in which `snakemake` alone has run, and what that wrote. Read it, or take `finished`."""
    workspace = Workspace(tmp_path_factory.mktemp("workflow") / "made", CONFIG, dummy_models, RECIPES)
    return workspace, workspace.succeed()


@pytest.fixture
def finished(made, tmp_path) -> Workspace:
    """A copy of the folder in which everything has been made."""
    return made[0].copy(tmp_path / "finished")


@pytest.fixture(scope="session")
def made_with_tensorrt(made, tmp_path_factory) -> Workspace:
    """As `made`, with TensorRT engines of model `other` besides, and all that depends on them."""
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("no TensorRT for RTX here")
    workspace = made[0].copy(tmp_path_factory.mktemp("workflow") / "tensorrt")
    workspace.config["build"]["engines"] = ["portable", "tensorrt"]
    workspace.config["matrix"] = [{"model": "other", "recipes": ["fp32"]}]
    workspace.succeed()
    return workspace


@pytest.fixture
def finished_with_tensorrt(made_with_tensorrt, tmp_path) -> Workspace:
    """A copy of the folder in which a TensorRT engine has been made too."""
    return made_with_tensorrt.copy(tmp_path / "finished")


@pytest.fixture(autouse=True)
def _offline(monkeypatch) -> None:
    monkeypatch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
