"""The command line, from weights to scores, and how it says what is wrong."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trtbuild.cli import app
from trtbuild.engine.config import read_config
from trtbuild.errors import UserError
from trtbuild.evaluation import benchmark as benchmark_module
from trtbuild.files import sha256

COMMANDS = (
    *(
        "convert",
        "calibrate",
        "quantize",
        "build",
        "run",
        "summarize",
        "score",
        "perplexity",
        "gate",
        "benchmark",
        "lm-eval",
    ),
    *("verify", "inspect", "plan", "doctor"),
)
SIZES = ("--max-batch-size", 4, "--max-input-len", 32, "--max-output-len", 16)
RECIPES = """
gptq: {dtype: float32, weights: {dtype: int4, method: gptq, group_size: 32}, calibration: {samples: 32, length: 32}}
sq-int8kv:
  dtype: float32
  weights: {dtype: int8}
  activations: {dtype: int8, smoothquant: 0.5}
  kv_cache: {dtype: int8}
  max_perplexity_increase: 3
fp32: {dtype: float32}
fp32-int8kv: {dtype: float32, kv_cache: {dtype: int8}}
wide: {dtype: float32, weights: {dtype: int4, group_size: 64}}
published: {dtype: float32, quant_checkpoint: {local: {path: somewhere}}}
"""


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
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=600)


@pytest.fixture(scope="module")
def made(tiny_config, tmp_path_factory):
    """A checkpoint and an engine made by the commands themselves."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "config.json").write_text(json.dumps(tiny_config))
    paths = SimpleNamespace(folder=folder, checkpoint=folder / "checkpoint", engine=folder / "engine")
    invoke("convert", "--dummy", folder / "config.json", "--seed", 1, "--output-dir", paths.checkpoint)
    invoke("build", "--checkpoint-dir", paths.checkpoint, "--output-dir", paths.engine, "--dtype", "float32", *SIZES)
    paths.run = ["run", "--engine-dir", paths.engine, "--tokenizer-dir", paths.checkpoint, "--max-output-len", 8]
    return paths


@pytest.fixture(scope="module")
def quantized(made):
    """What `calibrate`, `quantize` and `build` make of two recipes."""
    folder = made.folder / "quantized"
    folder.mkdir()
    paths = SimpleNamespace(checkpoint=made.checkpoint, recipes=folder / "recipes.yaml", ranges=folder / "ranges.npz")
    paths.recipes.write_text(RECIPES)
    text = ["--samples", 32, "--length", 32, "--device", "cpu"]
    invoke("calibrate", "--checkpoint-dir", made.checkpoint, "--output", paths.ranges, *text)
    paths.weights, paths.engines = {}, {}
    for name, ranges in (("gptq", []), ("sq-int8kv", ["--calibration", paths.ranges])):
        recipe = ["--recipes", paths.recipes, "--recipe", name, *ranges]
        paths.weights[name], paths.engines[name] = folder / name, folder / f"{name}-engine"
        invoke("quantize", "--checkpoint-dir", made.checkpoint, "--output-dir", paths.weights[name], *recipe)
        folders = ["--checkpoint-dir", paths.weights[name], "--output-dir", paths.engines[name]]
        invoke("build", *folders, *recipe, *SIZES)
    return paths


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"Example: trtbuild {command}" in invoke(command, "--help")


def test_help_lists_every_command():
    lines = invoke("--help").splitlines()
    listed = [line.split()[0] for line in lines[lines.index("Commands:") + 1 :] if line.strip()]
    assert set(listed) == set(COMMANDS)


def test_help_cuts_no_line_at_80_columns():
    assert "..." not in CliRunner().invoke(app, ["--help"], terminal_width=80).stdout.split("Commands:")[1]


@pytest.mark.parametrize(
    ("recipe", "capability", "message"),
    [
        ("fp8", "8.6", "GPUs of compute capability 8.6 have no FP8; build for 8.9, 12.0"),
        ("fp16", "9.0", "compute capability 9.0 is not one that tensorrt_rtx builds for: 7.5, 8.0"),
    ],
)
def test_a_gpu_that_no_engine_is_compiled_for_is_refused_before_any_work(tmp_path, recipe, capability, message):
    """Before it is seen that there is no checkpoint."""
    pytest.importorskip("tensorrt_rtx")
    engines = ["--engine", "portable", "--engine", "tensorrt", "--compute-capability", capability]
    folders = ["--checkpoint-dir", tmp_path / "nowhere", "--output-dir", tmp_path / "engine"]
    refused(message, "build", *folders, "--recipe", recipe, *engines)
    assert not list(tmp_path.iterdir())


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
    assert first.keys() == {"index", "prompt", "input_ids", "output_ids", "text", "finish_reason"}
    assert [(one["index"], one["prompt"]) for one in (first, second)] == [(0, "Hä"), (1, "star")]
    assert len(first["input_ids"]) == 3  # ä is two bytes
    assert len(second["input_ids"]) == 4
    assert len(first["output_ids"]) == len(second["output_ids"]) == 8
    assert isinstance(first["text"], str)
    assert first["finish_reason"] == "length"


def test_run_input_file_and_plain_text(made, tmp_path):
    """A line of a file is the prompt that --input-text is, if anything is in it; more lines than a batch holds."""
    prompts = [f"prompt {i}" for i in range(5)]
    (tmp_path / "prompts.txt").write_text("\n".join(["", *prompts[:2], " \t", *prompts[2:]]) + "\n\n")
    texts = [argument for prompt in prompts for argument in ("--input-text", prompt)]
    from_file = invoke(*made.run, "--input-file", tmp_path / "prompts.txt", "--json")
    assert from_file == invoke(*made.run, *texts, "--json")
    answers = [json.loads(line)["text"] for line in from_file.split("\n")[:-1]]
    plain = invoke(*made.run, *texts)
    assert plain == "".join(f"> {prompt}\n{answer}\n\n" for prompt, answer in zip(prompts, answers, strict=True))


def test_run_chat(made, tmp_path):
    """Template and system message are options; a special token in a prompt is text unless it is meant."""
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.role[0] + m.content + eos_token }}{% endfor %}")

    def ids(*options):
        return json.loads(invoke(*made.run, "--input-text", "a</s>", "--json", *options))["input_ids"]

    text, end = ids(), ids("--special-tokens")[-1]
    assert [len(text), len(ids("--special-tokens"))] == [5, 2]
    (u,), (s,) = (json.loads(invoke(*made.run, "--input-text", c, "--json"))["input_ids"] for c in "us")
    chat = ["--chat", "--chat-template", tmp_path / "t.jinja"]
    assert ids(*chat) == [u, *text, end]
    assert ids(*chat, "--system", "a</s>") == [s, *text, end, u, *text, end]
    assert ids(*chat, "--special-tokens") == [u, text[0], end, end]


def test_run_stream_prints_the_text(made):
    answer = json.loads(invoke(*made.run, "--input-text", "Wind", "--json"))["text"]
    assert invoke(*made.run, "--input-text", "Wind", "--stream") == answer + "\n"


def test_run_samples_by_seed(made):
    options = ["--input-text", "Wind", "--temperature", 1, "--top-k", 100, "--top-p", 0.9, "--json", "--seed"]
    one, again, other = (invoke(*made.run, *options, seed) for seed in (1, 1, 2))
    assert one == again != other


def test_run_token_ids_of_every_file(made, tmp_path):
    """What one run writes is what the next one may read, and all ways to write prompts give the same."""
    texts = ["Wind", "a star", "x"]
    options = [*made.run, *(part for text in texts for part in ("--input-text", text))]
    answers = [json.loads(line) for line in invoke(*options, "--json").splitlines()]
    paths = {name: tmp_path / f"file.{name}" for name in ("csv", "npy", "jsonl")}
    said = invoke(*options, "--output-csv", tmp_path / "out.csv", "--output-npy", tmp_path / "out.npy")
    assert said == ""
    ids = [answer["input_ids"] for answer in answers]
    sequences = [answer["input_ids"] + answer["output_ids"] for answer in answers]
    rows = np.load(tmp_path / "out.npy", allow_pickle=False)
    assert (rows.dtype, rows.shape) == (np.int32, (3, max(map(len, ids)) + 8))
    (eos,) = json.loads(invoke(*made.run, "--input-text", "</s>", "--special-tokens", "--json"))["input_ids"][-1:]
    assert [row[: len(ids)].tolist() for row, ids in zip(rows, sequences, strict=True)] == sequences
    assert all((row[len(ids) :] == eos).all() for row, ids in zip(rows, sequences, strict=True))
    assert np.array_equal(np.loadtxt(tmp_path / "out.csv", dtype=np.int32, delimiter=","), rows)

    paths["csv"].write_text("".join(f"{','.join(map(str, row))}\n" for row in ids))
    np.save(paths["npy"], np.array([[eos] * (9 - len(row)) + row for row in ids]))
    paths["jsonl"].write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    for path in paths.values():
        found = [json.loads(line) for line in invoke(*made.run, "--input-file", path, "--json").splitlines()]
        assert [one["output_ids"] for one in found] == [answer["output_ids"] for answer in answers]
        assert [one["prompt"] for one in found] == texts


@pytest.mark.parametrize("token", [320, 1 << 40, 10**30])
def test_run_tokens_that_the_engine_has_not(made, tmp_path, token):
    """Those that no tokenizer could take for tokens, too."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"input_ids": [5, token]}))
    message = f"p.jsonl: line 1 has the token {token}, the engine's vocabulary has 320"
    refused(message, *made.run, "--input-file", tmp_path / "p.jsonl", "--json")


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("p.txt", "one\n\n" + "x" * 33, "p.txt: line 3"),
        ("p.jsonl", '{"text": "one"}\n\n\n' + json.dumps({"prompt": "x" * 33}), "p.jsonl: line 4"),
        ("p.csv", "5\n\n" + ",".join("7" * 33), "p.csv: line 3"),
        ("p.npy", [[7] + [-1] * 32, [7] * 33], "p.npy: row 1"),
    ],
)
def test_run_names_the_line_of_a_prompt_that_is_too_long(made, tmp_path, name, content, place):
    if name.endswith("npy"):
        np.save(tmp_path / name, np.array(content))
    else:
        (tmp_path / name).write_text(content)
    message = rf"{tmp_path}/{place} has 33 tokens, the engine's max_input_len is 32"
    refused(message, *made.run, "--input-text", "first", "--input-file", tmp_path / name)


def test_run_numbers_prompts_that_are_in_no_file(made):
    refused("prompt 1 has 33 tokens", *made.run, "--input-text", "first", "--input-text", "x" * 33)


def test_run_beams_and_several_outputs(made):
    prompts = ["--input-text", "Wind", "--input-text", "star"]
    lines = invoke(*made.run, *prompts, "--num-beams", 4, "--n-best", 3, "--json").splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["index"] for one in found] == [0, 0, 0, 1, 1, 1]
    assert [one["prompt"] for one in found] == ["Wind"] * 3 + ["star"] * 3
    assert found[0]["score"] >= found[1]["score"] >= found[2]["score"]
    plain = invoke(*made.run, *prompts, "--num-beams", 4, "--length-penalty", 0, "--early-stopping", "never")
    assert re.match(r"> Wind\n\[-\d+\.\d{4}\] ", plain)
    drawn = ["--temperature", 1, "--seed", 5, "--json"]
    lines = invoke(*made.run, *prompts, *drawn, "--num-return-sequences", 2).splitlines()
    found = [json.loads(line) for line in lines]
    assert len({tuple(one["output_ids"]) for one in found}) == 4
    again = invoke(*made.run, *["--input-text", "Wind"] * 2, *["--input-text", "star"] * 2, *drawn).splitlines()
    assert [json.loads(line)["output_ids"] for line in again] == [one["output_ids"] for one in found]


def test_run_bad_word_and_penalties(made):
    """A letter that a free run says does not come, wherever it stands; nor does what it said with a large penalty."""
    run = lambda *options: json.loads(invoke(*made.run, "--input-text", "Wind", "--json", *options))
    free = run()
    letter = next(c for c in free["text"] if c.isascii() and c.isalpha())
    assert letter not in run("--bad-word", letter)["text"]
    for penalty in ("--presence-penalty", "--frequency-penalty"):
        assert len({*run(penalty, 1000)["output_ids"]}) == 8


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
    message = "was not built from .*other; give the checkpoint that it was built from"
    refused(message, "verify", "--engine-dir", made.engine, "--checkpoint-dir", other)

    config = json.loads((made.engine / "config.json").read_text())  # an engine that says it was, and was not
    config["inputs"]["model.safetensors"] = sha256(other / "model.safetensors")
    engine = shutil.copytree(made.engine, tmp_path / "engine")
    (engine / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(
        app, ["verify", "--engine-dir", str(engine), "--checkpoint-dir", str(other), *arguments]
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
    engine, baseline, difference = table.splitlines()[1:]
    assert engine.split()[:2] == ["portable", "float32"]
    assert engine.split()[2:] == baseline.split()[2:]
    assert difference.split() == ["difference", *["+0.00", "[+0.00,", "+0.00]"] * 4]
    sides = ("score", "--summaries", tmp_path / "e.jsonl", "--baseline", tmp_path / "hf.jsonl")
    assert invoke(*sides, "--side-by-side", tmp_path / "both.md") == table
    page, record = (tmp_path / "both.md").read_text(), json.loads((tmp_path / "e.jsonl").read_text().splitlines()[0])
    assert table.rstrip() in page
    assert page.count("\n## ") == 2
    for name, text in (("Reference", "reference"), ("portable float32, ROUGE-1 ", "summary")):
        quoted = page.split(f"**{name}", 1)[1].partition("\n\n")[2]
        assert quoted.startswith("\n".join(f"> {line}" for line in record[text].split("\n")) + "\n")
    refused("--side-by-side shows two models' summaries", *sides[:3], "--side-by-side", tmp_path / "both.md")
    assert invoke(*sides, "--check-accuracy", "--rouge1-threshold", printed["rouge1"]["mean"]) == table
    refused(r"e\.jsonl: ROUGE-1 is \d.*, below the 99 allowed", *sides, "--check-accuracy", "--rouge1-threshold", 99)


def test_perplexity(made, tmp_path):
    common = ["--checkpoint-dir", made.checkpoint, "--samples", 1, "--engine-dir", made.engine]
    printed = json.loads(invoke("perplexity", *common))
    assert 250 < printed["perplexity"] < 500
    assert printed["provenance"]["max_input_len"] == 32
    invoke("perplexity", *common, "--output", tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text())["perplexity"] == printed["perplexity"]


def test_gate(made, tmp_path):
    common = ("perplexity", "--checkpoint-dir", made.checkpoint, "--samples", 3)
    states = tmp_path / "hf.safetensors"
    hugging_face = (*common, "--max-input-len", 32, "--save-hidden-states", states)
    invoke(*hugging_face, "--output", tmp_path / "hf.json")
    engine = (*common, "--engine-dir", made.engine)
    invoke(*engine, "--hidden-states", states, "--output", tmp_path / "engine.json")
    refused("--save-hidden-states is of the Hugging Face model", *engine, "--save-hidden-states", states)
    refused("give --engine-dir", *common, "--hidden-states", states)
    sides = ("gate", "--perplexity", tmp_path / "engine.json", "--baseline", tmp_path / "hf.json")
    said = invoke(*sides, "--max-increase", 0.5, "--output", tmp_path / "gate.json")
    assert re.match(r"passed: perplexity [\d.]+, [+-]0\.00% \[[+-]0\.00, [+-]0\.00] over the .* allows 0\.5%\n$", said)
    result = json.loads((tmp_path / "gate.json").read_text())
    assert (result["verdict"], result["policy"], result["articles"]) == ("passed", "fail", 3)
    assert "the recipe allows 1%" in invoke(*sides, "--recipe", "fp16")
    divergence = json.loads((tmp_path / "engine.json").read_text())["divergence"]
    assert abs(divergence["mean_kl"]) < 1e-8 < divergence["p99_kl"] + 1e-6
    assert divergence["top1_percent"] > 99
    refused(r"engine\.json: failed: perplexity .* allows -1%", *sides, "--max-increase", -1)
    refused("give one of --recipe and --max-increase", *sides)
    refused("--max-increase is -100; a perplexity cannot fall", *sides, "--max-increase", -100)


def test_benchmark(made, monkeypatch):
    monkeypatch.setattr(benchmark_module, "BANDWIDTH_BYTES", 1 << 22)
    sizes = ["--batch-size", 2, "--input-len", 8, "--output-len", 4, "--repeats", 1]
    result = json.loads(invoke("benchmark", "--engine-dir", made.engine, *sizes, "--json"))
    assert result["batch_size"] == 2
    assert result["output_tokens_per_s"] > 0
    assert result["provenance"]["engine"] == "portable"
    table = invoke("benchmark", "--engine-dir", made.engine, *sizes)
    assert {"time to first token", "time a token", "floor"} <= {line[:24].strip() for line in table.splitlines()}


def test_benchmark_profiled_and_compared(made, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_module, "BANDWIDTH_BYTES", 1 << 22)
    common = ["--engine-dir", made.engine, "--input-len", 8, "--output-len", 4, "--repeats", 1]
    compared = ["--compare", "transformers", "--checkpoint-dir", made.checkpoint]
    result = json.loads(invoke("benchmark", *common, *compared, "--json"))
    assert result["transformers"]["dtype"] == result["provenance"]["dtype"]
    assert result["times_as_fast"].keys() == {"time_to_first_token", "time_per_output_token"}
    printed = invoke("benchmark", *common, *compared, "--profile", tmp_path / "profile").splitlines()
    assert "transformers" in printed[-2]
    assert printed[-1] == f"where the time goes: {tmp_path / 'profile' / 'profile.md'}"
    assert (tmp_path / "profile" / "profile.md").exists()


# Quantized weights


def test_calibrate_writes_what_it_measured(quantized):
    with np.load(quantized.ranges) as content:
        origin = json.loads(str(content["origin"]))
        assert content["model.layers.1.self_attn.key"].shape == (2 * 16,)
        assert content["model.layers.0.mlp.down_proj.input"].shape == (96,)
    assert origin["samples"] == 32
    assert origin["tokens"] == 32 * 32
    dataset = {"name": "trtbuild-news", "split": "calibration", "seed": 0, "length": 32}
    assert origin["dataset"].items() >= dataset.items()


@pytest.mark.parametrize("recipe", ["gptq", "sq-int8kv"])
def test_quantized_engine_records_its_recipe(quantized, recipe):
    config = json.loads((quantized.engines[recipe] / "config.json").read_text())
    declared = yaml.safe_load(RECIPES)[recipe]
    declared.pop("max_perplexity_increase", None)
    assert config["recipe"] == declared
    ranges = {quantized.ranges.name} if recipe == "sq-int8kv" else set()
    assert config["inputs"].keys() == {"config.json", "model.safetensors"} | ranges
    assert config["inputs"]["model.safetensors"] == sha256(quantized.weights[recipe] / "model.safetensors")


@pytest.mark.parametrize(("recipe", "operation"), [("gptq", "8 Int4Linear"), ("sq-int8kv", "8 W8A8Linear")])
def test_inspect_quantized(quantized, recipe, operation):
    assert operation in invoke("inspect", "--engine-dir", quantized.engines[recipe])
    assert "parameters" in invoke("inspect", "--checkpoint-dir", quantized.weights[recipe])


@pytest.mark.parametrize("recipe", ["gptq", "sq-int8kv"])
def test_run_and_verify_quantized(quantized, recipe):
    engine, weights = quantized.engines[recipe], quantized.weights[recipe]
    prompt = ["--input-text", "Wind", "--max-output-len", 8]
    answer = json.loads(invoke("run", "--engine-dir", engine, "--tokenizer-dir", weights, *prompt, "--json"))
    assert len(answer["output_ids"]) == 8
    text = invoke("verify", "--engine-dir", engine, "--checkpoint-dir", weights, *prompt, "--runtime", "portable")
    line = text.splitlines()[1]
    assert line.split()[-1] == "agrees"
    assert line.split()[-2] == "8/8"
    assert float(line.split()[3]) < 1e-5  # it computes what the numbers mean


def test_calibrate_and_quantize_write_the_same_again(made, quantized, tmp_path):
    text = ["--samples", 32, "--length", 32, "--device", "cpu"]
    invoke("calibrate", "--checkpoint-dir", made.checkpoint, "--output", tmp_path / "again.npz", *text)
    assert (tmp_path / "again.npz").read_bytes() == quantized.ranges.read_bytes()
    recipe = ["--recipes", quantized.recipes, "--recipe", "sq-int8kv", "--calibration", tmp_path / "again.npz"]
    invoke("quantize", "--checkpoint-dir", made.checkpoint, "--output-dir", tmp_path / "again", *recipe)
    for name in ("model.safetensors", "config.json", "smoothing.npz"):
        assert (tmp_path / "again" / name).read_bytes() == (quantized.weights["sq-int8kv"] / name).read_bytes()


def test_build_a_quantized_cache_for_plain_weights(made, quantized, tmp_path):
    """A recipe without weights needs no `quantize`."""
    recipe = ["--recipes", quantized.recipes, "--recipe", "fp32-int8kv", "--calibration", quantized.ranges]
    invoke("build", "--checkpoint-dir", made.checkpoint, "--output-dir", tmp_path / "engine", *recipe, *SIZES)
    folders = ["--engine-dir", tmp_path / "engine", "--checkpoint-dir", made.checkpoint]
    text = invoke("verify", *folders, "--input-text", "Wind", "--runtime", "portable")
    assert text.splitlines()[1].split()[-1] == "agrees"


def test_a_calibration_file_is_an_input_only_where_it_is_read(made, quantized, tmp_path):
    folders = ["--checkpoint-dir", made.checkpoint, "--output-dir", tmp_path / "engine"]
    invoke("build", *folders, "--calibration", quantized.ranges, *SIZES)
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["inputs"].keys() == {"config.json", "model.safetensors"}


# Random weights


@pytest.fixture(scope="module")
def declared(made, quantized):
    """Options that name the recipes, and a file of models: `deep` with three layers, `bare` without a config."""
    config = json.loads((made.folder / "config.json").read_text()) | {"num_hidden_layers": 3}
    source = {"local": {"path": "no/where"}}
    deep = {"source": source, "config": config}
    models = made.folder / "models.yaml"
    models.write_text(yaml.safe_dump({"deep": deep, "bare": {"source": source}}))
    return SimpleNamespace(models=["--models", models], recipes=["--recipes", quantized.recipes, "--recipe"])


@pytest.mark.parametrize(
    ("recipe", "operation"),
    [
        ("fp32", "9 DenseLinear"),
        ("gptq", "8 Int4Linear"),
        ("sq-int8kv", "8 W8A8Linear"),
        ("fp32-int8kv", "9 DenseLinear"),
    ],
)
def test_build_without_weights(declared, tmp_path, recipe, operation):
    """Every kind of recipe: its weights are quantized on the way, and nothing but the engine is left."""
    engine = tmp_path / "new" / "engine"
    model = ["--dummy", "deep", "--num-layers", 2, *declared.models]
    invoke("build", *model, *declared.recipes, recipe, "--output-dir", engine, *SIZES)
    assert [path.name for path in engine.parent.iterdir()] == ["engine"]
    config = json.loads((engine / "config.json").read_text())
    assert config["model"] == "dummy/deep"
    assert config["model_config"]["num_hidden_layers"] == 2
    calibrated = recipe != "fp32"
    assert config["recipe"].get("calibration") == ({"samples": 2, "length": 64} if calibrated else None)
    assert operation in invoke("inspect", "--engine-dir", engine)
    sizes = ["--input-len", 8, "--output-len", 1, "--repeats", 1]
    assert json.loads(invoke("benchmark", "--engine-dir", engine, *sizes, "--json"))["input_len"] == 8


def test_build_in_the_shape_of_a_file(made, tmp_path):
    """All layers where no number is given; the model is called after the file's folder."""
    model = ["--dummy", made.folder / "config.json", "--dtype", "float32"]
    invoke("build", *model, "--output-dir", tmp_path / "engine", *SIZES)
    config = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert config["model"] == f"dummy/{made.folder.name}"
    assert config["model_config"]["num_hidden_layers"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["engine"]


def test_convert_random_weights_of_a_declared_model(declared, tmp_path):
    options = ["--num-layers", 1, "--dtype", "bfloat16", *declared.models]
    invoke("convert", "--dummy", "deep", *options, "--output-dir", tmp_path / "checkpoint")
    config = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    assert config["num_hidden_layers"] == 1
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert "model.layers.1.mlp.down_proj.weight" not in tensors
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.bfloat16"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--local", "x"], {"local": {"path": "x"}}),
        (["--local", "x", "--model-version", "v2_13b"], {"local": {"path": "x", "model_version": "v2_13b"}}),
        (
            ["--hub", "a/b", "--revision", "c", "--model-version", "v1_7b"],
            {"hub": {"repo": "a/b", "revision": "c", "allow_patterns": None, "model_version": "v1_7b"}},
        ),
        (["--dummy", "c.json"], {"dummy": {"config": "c.json", "num_layers": None, "seed": 0, "dtype": None}}),
    ],
    ids=str,
)
def test_convert_hands_its_options_on(monkeypatch, tmp_path, arguments, expected):
    calls = []
    monkeypatch.setattr("trtbuild.checkpoint.sources.make_checkpoint", lambda *given: calls.append(given))
    invoke("convert", *arguments, "--output-dir", tmp_path / "x")
    assert calls == [(expected, tmp_path / "x")]


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


def test_check(made, tmp_path):
    """Every command that opens an engine has it; `verify` always looks at every byte."""
    changed = shutil.copytree(made.engine, tmp_path / "engine")
    data = bytearray((changed / "rank0.safetensors").read_bytes())
    data[-5] ^= 1
    (changed / "rank0.safetensors").write_bytes(data)
    engine, checkpoint = ["--engine-dir", changed], ["--checkpoint-dir", made.checkpoint]
    small = ["--batch-size", 1, "--input-len", 2, "--output-len", 2, "--repeats", 1]
    invoke("benchmark", *engine, *small)
    for command, *arguments in (
        ("run", "--tokenizer-dir", made.checkpoint, "--input-text", "x", "--check"),
        ("summarize", *checkpoint, "--samples", 1, "--output", tmp_path / "x.jsonl", "--check"),
        ("perplexity", *checkpoint, "--samples", 1, "--check"),
        ("benchmark", *small, "--check"),
        ("inspect", "--check"),
        ("verify", *checkpoint),
    ):
        refused(
            r"rank0.safetensors is not the file that was built \(its sha256 differs\)", command, *engine, *arguments
        )


def test_process_without_tensorrt(made, tmp_path):
    """Said before any work is done, and nothing is left."""
    arguments = ["--checkpoint-dir", made.checkpoint, "--output-dir", tmp_path / "x", "--engine", "tensorrt"]
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
        (["--dummy", "none", "--models", "none.yaml"], "none.yaml does not exist"),
        (["--gguf", "none.gguf", "--model-version", "v2_13b"], "--model-version is for --hub, --local and --dummy"),
        (["--local", "x", "--num-layers", 2], "--num-layers and --dtype describe random weights; give --dummy"),
        (["--local", "x", "--dtype", "float16"], "--num-layers and --dtype describe random weights; give --dummy"),
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
        (["--input-file", "none.txt"], "none.txt does not exist"),
        (["--input-text", ""], "prompt 0 is empty"),
        (["--input-text", "x" * 33], "prompt 0 has 33 tokens, the engine's max_input_len is 32"),
        (["--input-text", "x", "--max-output-len", 17], "max_output_len 17 is more than the engine's 16"),
        (["--input-text", "x", "--stream", "--json"], "--stream prints one output of one prompt"),
        (["--input-text", "x", "--input-text", "y", "--stream"], "--stream prints one output of one prompt"),
        (["--input-text", "x", "--chat"], "has no chat template; .* or --chat-template"),
        (["--input-text", "x", "--chat", "--chat-template", "qwne"], "there is no chat template 'qwne'; use baichuan,"),
        (["--input-text", "x", "--system", "y"], "--chat-template and --system are for a chat; add --chat"),
        (["--input-text", "x", "--temperature", 1, "--top-p", 0], "top_p is 0.0"),
        (
            ["--input-text", "x", "--top-k", 50],
            "temperature 0 is greedy, where --top-k and --top-p have no effect; add",
        ),
        (
            ["--input-text", "x", "--top-p", 0.9],
            "temperature 0 is greedy, where --top-k and --top-p have no effect; add",
        ),
        (["--input-text", "x", "--n-best", 2], "2 greedy outputs of a prompt would be equal"),
        (["--input-text", "x", "--n-best", 2, "--temperature", 1, "--stream"], "--stream prints one output"),
        (["--input-text", "x", "--num-beams", 2, "--stream"], "--stream prints one output"),
        (["--input-text", "x", "--num-beams", 9], "num_beams is 9"),
        (["--input-text", "x", "--length-penalty", 0.5], "--length-penalty and --early-stopping are for beams"),
        (["--input-text", "x", "--early-stopping", "never"], "--length-penalty and --early-stopping are for beams"),
        (["--input-text", "x", "--num-beams", 8], "8 beams of 1 prompts are more than the engine's max_batch_size 4"),
        (["--input-text", "x", "--bad-word", ""], "a bad word is empty"),
        (["--input-text", "x", "--bad-word", "</s>"], "a bad word is the end of a sequence"),
        (["--input-text", "x", "--min-output-len", 9], "min_output_len is 9; it must be 0 to max_output_len, 8"),
        (["--input-text", "x", "--runtime", "tensorrt"], "has no rank0.engine"),
        (["--input-text", "x", "--tokenizer-dir", "no/where"], "no/where has no tokenizer.json"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(map(str, value))[-30:],
)
def test_run_refuses(made, arguments, message):
    refused(message, *made.run, *arguments)


def test_build_all_ranks(made, tmp_path):
    layout = ["--tp-size", 2, "--pp-size", 2, "--no-use-parallel-embedding"]
    invoke("build", "--checkpoint-dir", made.checkpoint, "--output-dir", tmp_path / "engine", *layout, *SIZES)
    config = read_config(tmp_path / "engine")
    assert list(config["outputs"]) == [f"rank{rank}.safetensors" for rank in range(4)]
    assert config["mapping"] == {"tp_size": 2, "pp_size": 2, "use_parallel_embedding": False}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "max_input_len 1024 and max_output_len 128 are more than the 256 positions"),
        (["--max-batch-size", 0], "max_batch_size is 0; it must be at least 1"),
        (["--pp-size", 0], "tp_size 1 x pp_size 0: both must be at least 1"),
        (["--tp-size", 8, *SIZES], "tp_size 8 does not divide 4 heads, 2 KV heads and an intermediate_size of 96"),
        (["--checkpoint-dir", "no/where"], "the model folder no/where does not exist"),
        (["--engine", "tensorrt"], "build with --engine portable --engine tensorrt"),
    ],
    ids=str,
)
def test_build_refuses(made, tmp_path, arguments, message):
    if "tensorrt" in arguments:
        pytest.importorskip("tensorrt_rtx")
    refused(message, "build", "--checkpoint-dir", made.checkpoint, "--output-dir", tmp_path / "x", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --checkpoint-dir, or --dummy MODEL for random weights"),
        (["--checkpoint-dir", "x", "--dummy", "deep"], "--checkpoint-dir has weights, .*; give one"),
        (["--checkpoint-dir", "x", "--num-layers", 2], "--num-layers is for --dummy; "),
        (["--dummy", "deep", "--calibration", "x"], "--calibration is of a real model; "),
        (["--dummy", "dep"], "unknown model 'dep'; closest: deep; known models: bare, deep; or give"),
        (["--dummy", "bare"], r"models.yaml has no 'config' for bare; add its published config.json"),
        (["--dummy", "none.json"], "none.json does not exist"),
        (["--dummy", "deep", "--models", "x/y.yaml"], "x/y.yaml does not exist, which would declare 'deep'"),
        (["--dummy", "deep", "--max-input-len", 999], "999 and .* are more than the 256 positions"),
        (["--dummy", "deep", "--num-layers", 9], "num_layers is 9; the model has 3"),
        (["--dummy", "deep", "--pp-size", 4], "pp_size 4 is more than the model's 3 layers"),
        (
            ["--dummy", "deep", "--recipe", "gptq", "--tp-size", 2],
            "mlp.down_proj: 96 input channels in groups of 32 do not divide by tp_size 2; use one of 1",
        ),
        (["--dummy", "deep", "--recipe", "wide"], "group_size 64 does not divide the 96 input"),
        (["--dummy", "deep", "--recipe", "published"], "takes published weights .* has no dummy"),
    ],
    ids=str,
)
def test_build_refuses_random_weights(declared, tmp_path, arguments, message):
    """In one line, and nothing is left: no engine, no weights."""
    recipes = [] if "--recipe" not in arguments else declared.recipes[:2]
    refused(message, "build", "--output-dir", tmp_path / "x", *declared.models, *recipes, *SIZES, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_process_build_keeps_files_that_it_did_not_make(declared, made, tmp_path):
    """Said before any weights are made."""
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "thesis.txt").write_text("mine")
    model = ["--dummy", made.folder / "config.json"]
    one_line(
        process("build", *model, *SIZES, "--output-dir", tmp_path / "engine"), "holds files that trtbuild did not make"
    )
    assert [path.name for path in tmp_path.rglob("*")] == ["engine", "thesis.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", 99], "has 64 articles in its split 'calibration'; 99 were asked for"),
        (["--samples", 0], "samples"),
        (["--samples", -1], "samples"),
        (["--length", 1], "length"),
        (["--length", -5], "length"),
        (["--split", "test"], "has the splits evaluation and calibration, not 'test'"),
        (["--checkpoint-dir", "no/where"], "the model folder no/where does not exist"),
    ],
    ids=str,
)
def test_calibrate_refuses(made, tmp_path, arguments, message):
    refused(message, "calibrate", "--checkpoint-dir", made.checkpoint, "--output", tmp_path / "x.npz", *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "arguments", "message"),
    [
        ("fp32", [], "the recipe fp32 has no weights to quantize"),
        ("int9", [], "has no recipe 'int9'; it has fp32, fp32-int8kv, gptq, published, sq-int8kv, wide"),
        ("gptq", ["--recipes", "none.yaml"], "none.yaml does not exist"),
        ("wide", [], "group_size 64 does not divide the 96 input channels .* fit this model: 32"),
        ("sq-int8kv", [], "this recipe quantizes activations by their ranges; give the calibration file"),
        ("sq-int8kv", ["--calibration", "none.npz"], "the calibration file none.npz does not exist"),
        ("sq-int8kv", ["--calibration", "{recipes}"], "recipes.yaml is no calibration file; .*'trtbuild calibrate'"),
        ("gptq", ["--checkpoint-dir", "{gptq}"], "is quantized already .gptq.; start from the original model"),
    ],
    ids=lambda value: None if isinstance(value, str) else "+".join(value),
)
def test_quantize_refuses(made, quantized, tmp_path, recipe, arguments, message):
    known = {"recipes": quantized.recipes, "gptq": quantized.weights["gptq"]}
    arguments = [argument.format_map(known) for argument in arguments]
    folders = ["--checkpoint-dir", made.checkpoint, "--output-dir", tmp_path / "x", "--recipes", quantized.recipes]
    refused(message, "quantize", *folders, "--recipe", recipe, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "weights", "arguments", "message"),
    [
        ("gptq", "gptq", ["--dtype", "float32"], "--dtype and --recipe contradict each other"),
        ("int9", "gptq", [], "has no recipe 'int9'; it has fp32, fp32-int8kv, gptq, published, sq-int8kv, wide"),
        ("gptq", None, [], "checkpoint is not quantized; make the recipe's weights with 'trtbuild quantize'"),
        ("gptq", "sq-int8kv", [], "sq-int8kv was quantized by another recipe; make the recipe's weights"),
        ("published", None, [], "checkpoint is not quantized"),
        ("sq-int8kv", "sq-int8kv", [], "a quantized KV cache needs the ranges .*; give the calibration file"),
        ("fp32-int8kv", None, [], "a quantized KV cache needs the ranges .*; give the calibration file"),
        ("fp32-int8kv", None, ["--calibration", "none.npz"], "the calibration file none.npz does not exist"),
    ],
    ids=lambda value: None if isinstance(value, str) else "+".join(value or []),
)
def test_build_refuses_a_recipe(made, quantized, tmp_path, recipe, weights, arguments, message):
    checkpoint = quantized.weights[weights] if weights else made.checkpoint
    folders = ["--checkpoint-dir", checkpoint, "--output-dir", tmp_path / "x", "--recipes", quantized.recipes]
    refused(message, "build", *folders, "--recipe", recipe, *arguments)
    assert list(tmp_path.iterdir()) == []


def test_calibration_of_another_model(made, tiny_config, quantized, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(tiny_config | {"num_hidden_layers": 1}))
    other = tmp_path / "other"
    invoke("convert", "--dummy", tmp_path / "config.json", "--output-dir", other)
    recipe = ["--recipes", quantized.recipes, "--calibration", quantized.ranges, "--recipe"]
    message = "ranges.npz was measured on another model .*'num_hidden_layers': 2.* 'num_hidden_layers': 1"
    refused(message, "quantize", "--checkpoint-dir", other, "--output-dir", tmp_path / "x", *recipe, "sq-int8kv")
    refused(message, "build", "--checkpoint-dir", other, "--output-dir", tmp_path / "x", *recipe, "fp32-int8kv")
    assert not (tmp_path / "x").exists()


def test_verify_wants_the_quantized_checkpoint(made, quantized):
    folders = ["--engine-dir", quantized.engines["gptq"], "--checkpoint-dir", made.checkpoint]
    refused("was not built from .*; give the checkpoint that it was built from", "verify", *folders)


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


def test_nothing_replaces_its_own_input(made, quantized):
    """A model's folder given as the output of its own conversion or build stays as it is."""
    before = sorted(path.name for path in made.checkpoint.iterdir())
    message, recipe = "would replace its own input", ["--recipes", quantized.recipes, "--recipe", "gptq"]
    refused(message, "convert", "--local", made.checkpoint, "--output-dir", made.checkpoint)
    refused(message, "build", "--checkpoint-dir", made.checkpoint, "--output-dir", made.checkpoint)
    refused(message, "calibrate", "--checkpoint-dir", made.checkpoint, "--output", made.checkpoint)
    refused(message, "quantize", "--checkpoint-dir", made.checkpoint, "--output-dir", made.checkpoint, *recipe)
    assert sorted(path.name for path in made.checkpoint.iterdir()) == before


# What the operating system says


def test_an_output_is_refused_before_work(made, tmp_path):
    """Of every command that writes; the checkpoint that is named does not even exist."""
    os.mkfifo(tmp_path / "pipe")
    for command, option in (
        ("calibrate", "--output"),
        ("quantize", "--output-dir"),
        ("build", "--output-dir"),
        ("summarize", "--output"),
        ("perplexity", "--output"),
        ("convert", "--output-dir"),
        ("score", "--output"),
    ):
        refused("is a pipe; an output is a file or a folder", command, option, tmp_path / "pipe")


@pytest.mark.parametrize("arguments", [["--help"], ["inspect", "--checkpoint-dir", "CHECKPOINT"]])
def test_process_says_that_standard_output_is_full(made, arguments):
    arguments = [made.checkpoint if argument == "CHECKPOINT" else argument for argument in arguments]
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "trtbuild", *map(str, arguments)]
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=600)
    assert (result.returncode, result.stderr) == (2, "error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("module", ["torch", "typer", "tqdm"])
def test_process_interrupted_while_it_imports(tmp_path, module):
    (tmp_path / f"{module}.py").write_text("import time; print('importing', flush=True); time.sleep(600)")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "trtbuild", "inspect", "--engine-dir", "x"]
    environment = os.environ | {"PYTHONPATH": path}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, env=environment, text=True) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 130
        assert process.stderr.read() == "interrupted\n"


def test_process_interrupted_at_work(made, tmp_path):
    """A model that would take minutes: one word, 130, and nothing is left."""
    output = tmp_path / "out" / "checkpoint"
    command = [
        sys.executable,
        "-m",
        "trtbuild",
        "convert",
        "--dummy",
        made.folder / "config.json",
        "--output-dir",
        output,
    ]
    slow = "import time, trtbuild.checkpoint.dummy as d; d.save_byte_tokenizer = lambda folder: time.sleep(600)\n"
    code = (
        f"{slow}import sys; sys.argv[1:] = {list(map(str, command[3:]))!r}\nfrom trtbuild.__main__ import main; main()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as process:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("out/.*.tmp/config.json")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 130
        assert process.stderr.read() == "interrupted\n"
    assert list((tmp_path / "out").iterdir()) == []
