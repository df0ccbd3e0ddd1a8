"""Every package that is imported is declared, and pinned once: constraints.txt has the versions."""

import ast
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = (ROOT / "constraints.txt").read_text().split()
# Of the workflow's packages, those that run Snakemake itself; the environment is what its rules run in.
OUTSIDE_RULES = {"pip", "snakemake"}
# Triton comes with torch's CUDA builds, TensorRT for data-centre GPUs from NVIDIA's own index.
UNDECLARED = {"triton", "tensorrt", "tensorrt_rtx"}


def pins(lines: list[str]) -> dict[str, str]:
    """`name==version` lines; a name once."""
    pairs = [(canonicalize_name(name), version) for name, version in (line.split("==") for line in lines)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def declared(*extras: str) -> set[str]:
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][extra] for extra in extras)]
    return {canonicalize_name(Requirement(line).name) for lines in lists for line in lines}


def imported(*folders: str) -> set[str]:
    """The first word of every absolute import, wherever it stands."""
    names = set()
    for file in (file for folder in folders for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_everything_declared_is_pinned(extra):
    assert declared(extra) - {"pip"} <= pins(CONSTRAINTS).keys()


def test_the_environment_of_the_rules():
    *others, pip = yaml.safe_load((ROOT / "config" / "environment.yaml").read_text())["dependencies"]
    assert others == ["python=3.11", "pip"]
    environment = pins(pip["pip"])
    assert environment.keys() == declared("workflow", "tensorrt-rtx", "mpi", "lm-eval") - OUTSIDE_RULES
    assert environment.items() <= pins(CONSTRAINTS).items()


def test_everything_imported_is_declared():
    distributions = packages_distributions()
    names = imported("trtbuild", "workflow_scripts") - UNDECLARED - {"trtbuild"}
    assert {"torch", "sentencepiece", "yaml", "google"} <= names
    known = declared("workflow", "mpi", "lm-eval")
    missing = {name for name in names if not {canonicalize_name(d) for d in distributions[name]} & known}
    assert not missing
