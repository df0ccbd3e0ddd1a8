"""What a user gets wrong, and the one line that says so."""

import pytest

pytestmark = pytest.mark.slow


def set_to(*path):
    """A change of `config`, `models` or `recipes`: the keys, then the value."""
    name, *keys, last, value = path

    def change(workspace):
        part = getattr(workspace, name)
        for key in keys:
            part = part[key]
        part[last] = value

    return change


def replace_by(name: str, text: str | None):
    return lambda workspace: setattr(workspace, name, text)


BAD_CONFIGURATION = {
    "wrong type": (
        set_to("config", "build", "max_batch_size", "four"),
        "config/config.yaml: build.max_batch_size: 'four' is not of type 'integer'",
    ),
    "too small": (
        set_to("config", "evaluation", "dataset", "samples", 0),
        "config/config.yaml: evaluation.dataset.samples: 0 is less than the minimum of 1",
    ),
    "unknown key": (
        set_to("config", "build", "max_batch", 4),
        "config/config.yaml: build: Additional properties are not allowed ('max_batch' was unexpected); "
        "known keys: engines, max_batch_size, max_input_len, max_output_len, extrapolate_positions, "
        "remove_input_padding, compute_capabilities",
    ),
    "unknown engine": (
        set_to("config", "build", "engines", ["portable", "onnx"]),
        "config/config.yaml: build.engines.1: 'onnx' is not one of ['portable', 'tensorrt']",
    ),
    "more positions than the model has": (
        set_to("config", "build", "max_input_len", 2041),
        "config/config.yaml: build: for the model tiny max_input_len 2041 and max_output_len 8 are more than the 2048 "
        "positions that the model was made for",
    ),
    "more output than built for": (
        set_to("config", "evaluation", "max_output_len", 9),
        "config/config.yaml: evaluation.max_output_len is 9, more than build.max_output_len 8",
    ),
    "unknown model in the matrix": (
        set_to("config", "matrix", [{"model": "tinny", "recipes": ["fp32"]}]),
        "unknown model 'tinny'; closest: tiny; known models: other, tiny",
    ),
    "unknown recipe in the matrix": (
        set_to("config", "matrix", [{"model": "tiny", "recipes": ["int9"]}]),
        "unknown recipe 'int9'; closest: int8wo, int8kv, int4wo; known recipes: awq, ",
    ),
    "baseline as a recipe in the matrix": (
        set_to("config", "matrix", [{"model": "tiny", "recipes": ["hf"]}]),
        "results/tiny/hf/benchmark.json",
    ),
    "malformed models": (replace_by("models", "tiny: {source: [\n"), "config/models.yaml is not valid YAML: "),
    "malformed config": (replace_by("config", "build: {engines: [\n"), "Config file is not valid JSON or YAML."),
    "a key of the configuration twice": (
        replace_by("config", "models: a\nrecipes: b\nmodels: c\n"),
        "config/config.yaml, line 3: the key models is there already, in line 1",
    ),
    "a model twice": (
        replace_by("models", "tiny: {source: {local: {path: a}}}\ntiny: {source: {local: {path: b}}}\n"),
        "config/models.yaml, line 2: the key tiny is there already, in line 1",
    ),
    "a recipe named no": (
        replace_by("recipes", "no: {dtype: float32}\n"),
        "config/recipes.yaml, line 1: YAML takes the key no for bool; write 'no'",
    ),
    "a recipe named 7 in the matrix": (
        set_to("config", "matrix", [{"model": "tiny", "recipes": [7]}]),
        "config/config.yaml: matrix.0.recipes.0: 7 is not of type 'string'",
    ),
    "empty models": (replace_by("models", ""), "config/models.yaml: the file: None is not of type 'object'"),
    "missing models": (replace_by("models", None), "config/models.yaml does not exist"),
    "two sources": (
        set_to("models", "tiny", "source", "local", {"path": "there"}),
        "config/models.yaml: tiny.source: ",
    ),
    "unknown source": (
        set_to("models", "tiny", "source", {"ftp": {}}),
        "config/models.yaml: tiny.source: Additional properties are not allowed ('ftp' was unexpected); "
        "known keys: hub, local, gguf, pypi, dummy",
    ),
    "unknown chat template": (
        set_to("models", "tiny", "chat_template", "qwne"),
        "config/models.yaml: tiny.chat_template: there is no chat template 'qwne'; use baichuan,",
    ),
    "missing chat template": (
        set_to("models", "tiny", "chat_template", "own.jinja"),
        "config/models.yaml: tiny.chat_template: own.jinja does not exist",
    ),
    "unknown dtype": (
        set_to("recipes", "fp32", "dtype", "float8"),
        "config/recipes.yaml: fp32.dtype: 'float8' is not one of ['float32', 'float16', 'bfloat16']",
    ),
    "contradictory recipe": (
        set_to("recipes", "fp32", {"dtype": "float32", "weights": {"dtype": "int4"}, "activations": {"dtype": "int8"}}),
        "config/recipes.yaml: fp32: weights int4 keep activations in 16 bits; remove activations",
    ),
    "more articles than there are": (
        set_to("config", "evaluation", "dataset", "samples", 17),
        "config/config.yaml: evaluation.dataset: the data set trtbuild-news has 16 articles in its split 'evaluation'; "
        "17 were asked for",
    ),
    "more articles to calibrate with": (
        set_to("recipes", "fp32", {"dtype": "float16", "kv_cache": {"dtype": "int8"}, "calibration": {"samples": 65}}),
        "config/recipes.yaml: fp32.calibration: the data set trtbuild-news has 64 articles in its split 'calibration'; "
        "65 were asked for",
    ),
    "unknown split": (
        set_to("config", "evaluation", "dataset", "split", "test"),
        "config/config.yaml: evaluation.dataset: the data set trtbuild-news has the splits evaluation and calibration, "
        "not 'test'",
    ),
    "rehearse": (set_to("config", "rehearse", "yes"), "config/config.yaml: rehearse: 'yes' is not of type 'boolean'"),
    "reserved model name": (set_to("models", "rehearsal", {"source": {}}), "config/models.yaml: the file: 'rehearsal'"),
    "reserved recipe name": (set_to("recipes", "hf", {"dtype": "float32"}), "config/recipes.yaml: the file: 'hf'"),
}


@pytest.mark.parametrize("name", BAD_CONFIGURATION)
def test_bad_configuration(empty, name):
    change, line = BAD_CONFIGURATION[name]
    change(empty)
    output = empty.fail()
    assert line in output
    assert not empty.results.exists()


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("results/tinny/fp32/rouge.json", "unknown model 'tinny'; closest: tiny; known models: other, tiny"),
        (
            "results/tiny/int9/rouge.json",
            "unknown recipe 'int9'; closest: int8wo, int8kv, int4wo; known recipes: awq, ",
        ),
        (
            "results/tiny/fp32/rogue.json",
            "results/tiny/fp32/rogue.json: nothing makes this; closest: results/tiny/fp32/rouge.json; ask for "
            "results/tiny/fp32/benchmark.json, results/tiny/fp32/engine/config.json, ",
        ),
        ("results/tiny/fp32@tp2/", "results/tiny/fp32@tp2/: nothing makes this; "),
        ("results/tiny/hf", "results/tiny/hf: nothing makes this; closest: results/tiny/hf/rouge.json; ask for "),
        ("results/tiny/", "results/tiny/: nothing makes this; "),
        ("tiny/fp32/rouge.json", "tiny/fp32/rouge.json: nothing makes this; ask for results/tiny/fp32/rouge.json"),
        (
            "result/tiny/hf/rouge.json",
            "result/tiny/hf/rouge.json: nothing makes this; ask for results/tiny/hf/rouge.json",
        ),
        ("results/tiny/fp32/engine", "closest: results/tiny/fp32/engine/"),
    ],
)
def test_unknown_target(empty, target, line):
    assert line in empty.fail(target)


def failing_rule(workspace, target: str, log: str, line: str) -> None:
    """The rule's log ends with `line`, and Snakemake shows it."""
    output = workspace.fail(target)
    assert (workspace.results / log).read_text().rstrip().splitlines()[-1] == line
    assert line in output.splitlines()
    assert not [path for path in workspace.results.rglob("*") if path.is_file() and path.suffix != ".log"]


def test_missing_model_folder(empty, tmp_path):
    empty.models["tiny"]["source"] = {"local": {"path": str(tmp_path / "nowhere")}}
    line = f"error: the model folder {tmp_path / 'nowhere'} does not exist"
    failing_rule(empty, "results/tiny/fp32/rouge.json", "tiny/logs/checkpoint.log", line)


def test_no_chat_template(finished):
    """Said before any work where it can be known: of a checkpoint that is there, and of a folder to be converted."""
    line = "config/models.yaml: {}: evaluation.chat is true, but there is no chat_template, nor has the tokenizer in {}"
    del finished.models["tiny"]["chat_template"]
    folder = finished.results / "tiny" / "checkpoint"
    finished.models["third"] = {"source": {"local": {"path": str(folder)}}}
    for model, where in (("tiny", "results/tiny/checkpoint"), ("third", folder)):
        result = finished.run("--dry-run", f"results/{model}/hf/rouge.json")
        assert result.returncode != 0
        assert line.format(model, where) in result.stdout
    finished.config["evaluation"]["chat"] = False
    finished.succeed("--dry-run", "results/third/hf/rouge.json")


def test_no_chat_template_in_what_is_fetched(empty):
    """Nobody knows before; then it is said by the rule that fetches it, long before anything is summarized."""
    del empty.models["tiny"]["chat_template"]
    line = (
        "error: config/models.yaml: tiny: evaluation.chat is true, but there is no chat_template, nor has the "
        "tokenizer in dummy weights one; add it, such as tiny.chat_template: plain"
    )
    failing_rule(empty, "results/tiny/fp32/rouge.json", "tiny/logs/checkpoint.log", line)
    empty.config["evaluation"]["chat"] = False
    empty.succeed("results/tiny/checkpoint")


def test_damaged_gguf_file(empty, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"")
    empty.models["tiny"]["source"] = {"gguf": {"path": str(tmp_path / "model.gguf"), "sha256": "0" * 64}}
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    line = (
        f"error: model.gguf has sha256 {nothing}, expected {'0' * 64}; it is damaged or another version"
    )  # fmt: skip
    failing_rule(empty, "results/tiny/hf/rouge.json", "tiny/logs/checkpoint.log", line)


def test_other_jobs_go_on_where_they_can(empty, tmp_path):
    """With --keep-going, one model's failure leaves another's results."""
    empty.models["tiny"]["source"] = {"local": {"path": str(tmp_path / "nowhere")}}
    empty.fail("--keep-going", "results/tiny/hf/rouge.json", "results/other/fp32/engine/config.json")
    assert (empty.results / "other/fp32/engine/config.json").exists()
    assert not (empty.results / "tiny/checkpoint").exists()
