"""Names of options: one name means one thing; old ones, and underscores, go on working. `--version`, completion."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import get_args, get_origin

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from trtbuild.cli import app
from trtbuild.cli.names import OLD, renamed
from trtbuild.errors import UserError

COMMANDS = get_command(app).commands
# What names a file or a folder that a command writes; no other option does.
OUTPUTS = {
    "--output",
    "--output-dir",
    "--side-by-side",
    "--profile",
    "--save-hidden-states",
    "--output-csv",
    "--output-npy",
}


def options_by_name():
    """Every option's declarations, by its longest name."""
    found = {}
    for command in COMMANDS.values():
        for option in (param for param in command.params if param.param_type_name == "option"):
            found.setdefault(max(option.opts, key=len), []).append((command.name, option))
    return found


def test_an_option_takes_the_same_in_every_command():
    """A flag here is one there; a choice has the same values. Each one says what it is."""
    for name, declared in options_by_name().items():
        types = [option.type_descriptor.annotation for _, option in declared]
        kinds = {*(str(get_args(one)[0] if get_origin(one) is list else one) for one in types)}
        assert len(kinds) == 1, (name, kinds)
        assert all(option.help for _, option in declared), name


@pytest.mark.parametrize("name", options_by_name())
def test_outputs_are_told_by_their_names(name, tmp_path):
    """They are looked at before anything is done, which shows that a command means to write there."""
    os.mkfifo(tmp_path / "pipe")
    for command, option in options_by_name()[name]:
        if option.is_flag or name == "--help":
            continue
        given = CliRunner().invoke(app, [command, name, str(tmp_path / "pipe")])
        refused = isinstance(given.exception, UserError) and "an output is a file or a folder" in str(given.exception)
        assert refused == (name in OUTPUTS), (command, name)


def test_old_names_are_gone_and_lead_to_new_ones():
    for command, names in OLD.items():
        options = {name for option in COMMANDS[command].params for name in option.opts}
        assert {*names.values()} <= options
        assert not {*names} & options


def test_old_names_work_and_are_said_once(capsys):
    given = ["--engine_dir=a", "--model-config", "m", "--dummy", "--num-layers", "2", "--engine_dir=b"]
    assert renamed("build", given) == ["--output-dir=a", "--dummy", "m", "--num-layers", "2", "--output-dir=b"]
    assert capsys.readouterr().err.splitlines() == [
        "trtbuild build: --engine_dir is now called --output-dir",
        "trtbuild build: --model-config is now called --dummy",
    ]
    given = ["--engine-dir", "a", "--dtype", "float16"]
    assert renamed("perplexity", given) == ["--engine-dir", "a", "--baseline-dtype", "float16"]
    assert capsys.readouterr().err == "trtbuild perplexity: --dtype is now called --baseline-dtype\n"
    assert renamed("build", ["--dummy", "m", "--output-dir", "x"]) == ["--dummy", "m", "--output-dir", "x"]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("given", [["--engine_dir", "no_where"], ["--engine_dir=no_where"], ["--engine-dir=no_where"]])
def test_underscored_options(given):
    """The value is left as it is."""
    result = CliRunner().invoke(app, ["inspect", *given])
    assert "no_where" in str(result.exception)


def process(*arguments, **environment):
    command = [Path(sys.executable).with_name("trtbuild"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=600)


def test_version():
    result = process("--version")
    assert (result.stdout, result.stderr) == (f"trtbuild {version('trtbuild')}\n", "")


def test_help_imports_nothing_large():
    """So that it is there in 0.12 s; torch alone takes more than a second."""
    code = (
        "import sys; from typer.testing import CliRunner; from trtbuild.cli import app\n"
        f"for command in {[*COMMANDS]}: assert not CliRunner().invoke(app, [command, '--help']).exit_code\n"
        "assert not {'torch', 'transformers', 'numpy', 'jsonschema'} & {*sys.modules}, sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == 0


def test_completion():
    words = {"COMP_WORDS": "trtbuild qua", "COMP_CWORD": "1", "_TRTBUILD_COMPLETE": "complete_bash"}
    assert process(**words).stdout.split() == ["quantize"]
    words["COMP_WORDS"], words["COMP_CWORD"] = "trtbuild quantize --recip", "2"
    assert process(**words).stdout.split() == ["--recipe", "--recipes"]
    words["COMP_WORDS"], words["COMP_CWORD"] = "trtbuild quantize --recipe sq-per-", "3"
    assert process(**words).stdout.split() == [
        *("sq-per-tensor", "sq-per-channel", "sq-per-token", "sq-per-token-per-channel"),
    ]
    program = Path(sys.executable).with_name("trtbuild")  # it looks for the shell that started it
    shown = subprocess.run(["bash", "-c", f"{program} --show-completion; true"], capture_output=True, text=True)
    assert "_TRTBUILD_COMPLETE=complete_bash" in shown.stdout
