"""What a user finds under examples/ does what it says: every command of a README is run, as it stands there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


@pytest.fixture
def own_model(tmp_path) -> Path:
    """A copy of the example, as deep in a repository."""
    for name in ("Snakefile", "rules", "profiles", "workflow_scripts", "trtbuild", "config"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    return shutil.copytree(
        REPOSITORY / "examples" / "own_model",
        tmp_path / "examples" / "own_model",
        ignore=shutil.ignore_patterns("model", "results", ".snakemake"),
    )


def commands(readme: Path) -> list[str]:
    """Indented lines; one that ends with a backslash goes on in the next."""
    lines = re.findall(r"^    (.*)$", readme.read_text(), re.MULTILINE)
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def test_own_model(own_model):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    outputs = {}
    for command in commands(own_model / "README.md"):
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=own_model,
            env=os.environ | {"PATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1200,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}"
        outputs[command.split()[0]] = result.stdout
    assert outputs.keys() == {"trtbuild", "snakemake", "cat", "sed", "ls"}
    assert {"fp16", "mine-int4"} <= set(re.findall(r"^\| ([\w-]+) \|", outputs["cat"], re.MULTILINE))
    assert len([name for name in outputs["ls"].split() if name.startswith("awq-int4")]) == 2
