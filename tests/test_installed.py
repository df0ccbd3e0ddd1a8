"""The package without its repository: what is built as a wheel, installed, and run in an empty folder."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[1]
SIZES = ["--max-batch-size", "2", "--max-input-len", "16", "--max-output-len", "8"]


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """The folder of `trtbuild` and `python` of an environment with the wheel, and this one's other packages."""
    folder = tmp_path_factory.mktemp("installed")
    source, environment = folder / "source", folder / "environment"
    for part in ("trtbuild", "pyproject.toml", "README.md", "LICENSE"):  # a build leaves files beside them
        copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(REPOSITORY / part, source / part)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    run(folder, *pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    venv.create(environment)
    (wheel,) = folder.glob("*.whl")
    run(folder, *pip, "--python", environment / "bin/python", "install", "--no-deps", "--no-index", wheel)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    shutil.rmtree(source)
    return environment / "bin"


def run(folder: Path, *command: object) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_chain_in_an_empty_folder(scripts, tiny_config, tmp_path):
    """With a shipped recipe, then with the folder's own, of which one replaces a shipped one."""

    def trtbuild(*arguments: object) -> str:
        return run(tmp_path, scripts / "trtbuild", *arguments)

    package = Path(run(tmp_path, scripts / "python", "-c", "import trtbuild; print(trtbuild.__file__)"))
    assert package.is_relative_to(scripts.parent)
    code = (
        "from pathlib import Path; from trtbuild.evaluation.page import page; "
        "from trtbuild.evaluation.recipes import collect; print(page(collect(Path('none'), {})))"
    )
    assert "</html>" in run(tmp_path, scripts / "python", "-c", code)  # its template is no module
    (tmp_path / "config.json").write_text(json.dumps(tiny_config | {"intermediate_size": 128}))
    original, quantized = ("--checkpoint-dir", "checkpoint"), ("--checkpoint-dir", "quantized")
    engine = ("--engine-dir", "engine")
    trtbuild("convert", "--dummy", "config.json", "--output-dir", "checkpoint")
    trtbuild("quantize", *original, "--recipe", "awq", "--output-dir", "quantized")
    trtbuild("build", *quantized, "--recipe", "awq", *engine, *SIZES)
    table = trtbuild("verify", *engine, *quantized, "--input-text", "x", "--runtime", "portable")
    assert table.splitlines()[-1].endswith("agrees")
    prompt = ("--chat", "--chat-template", "plain", "--input-text", "x", "--max-output-len", "8", "--json")
    assert json.loads(trtbuild("run", *engine, "--tokenizer-dir", "checkpoint", *prompt))["output_ids"]

    (tmp_path / "config").mkdir()
    (tmp_path / "config/recipes.yaml").write_text("mine: {dtype: bfloat16}\nfp16: {dtype: float32}\n")
    for recipe, dtype in (("mine", "bfloat16"), ("fp16", "float32"), ("bf16", "bfloat16")):
        trtbuild("build", *original, "--recipe", recipe, "--output-dir", recipe, *SIZES)
        assert json.loads((tmp_path / recipe / "config.json").read_text())["recipe"] == {"dtype": dtype}
