"""Imports run down only: a package may import those before it in this list, and itself (docs/architecture.md)."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "trtbuild"
FLOORS = (
    *("limits", "errors", "processes", "progress", "files", "yaml_reader", "layout", "datasets", "gpus"),
    *("tensors", "tokenizer", "kernels", "network", "linear", "models", "checkpoint", "decoder"),
    *("engine", "runtime", "quantization", "evaluation"),
    *("rehearsal", "resources", "folder_lock", "workflow", "planning", "kept_outputs", "launch", "cli", "__main__"),
)


def imported(file: Path) -> set[str]:
    """The parts of the package that a file imports, wherever in it it does."""
    nodes = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {
        f"{node.module}.{alias.name}" for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("trtbuild.")} & {*FLOORS}


def test_every_part_of_the_package_has_a_floor():
    parts = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - {"__init__"} == {*FLOORS}


def test_no_import_runs_upwards():
    upward = {
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in PACKAGE.rglob("*.py")
        for name in imported(file)
        if file != PACKAGE / "__init__.py"
        and FLOORS.index(name) > FLOORS.index(file.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    }
    assert not upward


def test_a_workflow_starts_without_torch():
    """Every `snakemake`, and every job of it, reads the Snakefile."""
    rules = (PACKAGE.parent / "rules" / "common.smk").read_text()
    imports = [line for line in rules.splitlines() if line.startswith("from trtbuild")]
    assert len(imports) > 5
    code = "\n".join([*imports, "import sys", "sys.exit('torch' in sys.modules)"])
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0
