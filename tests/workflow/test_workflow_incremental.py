"""One change of the configuration, and exactly the jobs that it makes run again."""

import shutil

import pytest
from workspace import REPOSITORY

pytestmark = pytest.mark.slow

ENGINES = ("tiny/fp32", "tiny/bf16", "other/fp32")
BASELINES = ("tiny/hf", "other/hf")


def jobs(rules: str, runs: tuple[str, ...]) -> set[str]:
    return {f"{rule} {run}" for rule in rules.split() for run in runs}


SUMMARIES = (
    jobs("summarize", ENGINES)
    | {"summarize_hf tiny", "summarize_hf other"}
    | jobs("rouge", (*ENGINES, *BASELINES))
)  # fmt: skip
PERPLEXITY = jobs("perplexity gate", ENGINES) | {"perplexity_hf tiny", "perplexity_hf other"}
AFTER_ENGINE = "engine summarize perplexity gate rouge benchmark"


def set_to(*path):
    """A change of the configuration: the keys, then the value."""
    *keys, last, value = path

    def change(workspace):
        part = workspace.config
        for key in keys:
            part = part[key]
        assert part[last] != value
        part[last] = value

    return change


CHANGES = {
    "evaluation.max_output_len": (set_to("evaluation", "max_output_len", 4), SUMMARIES),
    "evaluation.prompt": (set_to("evaluation", "prompt", "News: {article}"), SUMMARIES),
    "evaluation.chat": (set_to("evaluation", "chat", False), SUMMARIES),
    "evaluation.dataset.samples": (set_to("evaluation", "dataset", "samples", 3), SUMMARIES | PERPLEXITY),
    "evaluation.baseline_dtype": (
        set_to("evaluation", "baseline_dtype", "bfloat16"),
        {"summarize_hf tiny", "summarize_hf other", "perplexity_hf tiny", "perplexity_hf other"}
        | jobs("perplexity gate rouge", ENGINES)
        | jobs("rouge", BASELINES),
    ),
    "evaluation.runtime": (
        set_to("evaluation", "runtime", "auto"),
        jobs("summarize perplexity gate rouge benchmark", ENGINES),
    ),
    "benchmark.repeats": (set_to("benchmark", "repeats", 2), jobs("benchmark", ENGINES)),
    # The limits are part of an engine; the baseline shares only the length to which articles are cut.
    "build.max_batch_size": (set_to("build", "max_batch_size", 2), jobs(f"portable_engine {AFTER_ENGINE}", ENGINES)),
    "build.max_input_len": (
        set_to("build", "max_input_len", 900),
        jobs(f"portable_engine {AFTER_ENGINE}", ENGINES) | SUMMARIES | PERPLEXITY,
    ),
    "build.extrapolate_positions": (
        set_to("build", "extrapolate_positions", True),
        jobs(f"portable_engine {AFTER_ENGINE}", ENGINES),
    ),
    # A portable engine is packed inside in any case, but config.json records the choice, and results depend on it.
    "build.remove_input_padding": (set_to("build", "remove_input_padding", False), jobs(AFTER_ENGINE, ENGINES)),
    "build.compute_capabilities": (set_to("build", "compute_capabilities", "auto"), set()),
    "build.engines": (
        set_to("build", "engines", ["portable", "tensorrt"]),
        jobs(f"tensorrt_engine {AFTER_ENGINE}", ENGINES),
    ),
    "a smaller matrix": (set_to("matrix", [{"model": "tiny", "recipes": ["fp32"]}]), set()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_of_a_setting(finished, name):
    change, expected = CHANGES[name]
    change(finished)
    assert finished.pending() == expected


def test_change_of_a_recipe(finished):
    finished.recipes["bf16"]["dtype"] = "float16"
    assert finished.pending() == jobs(f"portable_engine {AFTER_ENGINE}", ("tiny/bf16",))


def test_new_recipe(finished):
    finished.recipes["fp16"] = {"dtype": "float16"}
    assert finished.pending() == set()
    finished.config["matrix"][0]["recipes"].append("fp16")
    assert finished.pending() == jobs(f"portable_engine {AFTER_ENGINE}", ("tiny/fp16",))


def test_removed_and_reordered_recipes(finished):
    del finished.config["matrix"][0]["recipes"][1]
    finished.recipes = {"new": {"dtype": "float16"}, "fp32": finished.recipes["fp32"]}
    assert finished.pending() == set()


def test_change_of_a_models_weights(finished):
    finished.models["tiny"]["source"]["dummy"]["seed"] = 7
    engines = ("tiny/fp32", "tiny/bf16")
    assert finished.pending() == {"checkpoint tiny", "summarize_hf tiny", "perplexity_hf tiny", "rouge tiny/hf"} | jobs(
        f"portable_engine {AFTER_ENGINE}", engines
    )


def test_what_rehearsals_are_made_of_is_no_part_of_a_model(finished):
    finished.models["tiny"]["config"] = {"model_type": "llama"}
    assert finished.pending() == set()


def test_change_of_a_chat_template(finished):
    """Its text counts, and summaries alone depend on it."""
    own = finished.folder / "own.jinja"
    own.write_text((REPOSITORY / "trtbuild/chat_templates/plain.jinja").read_text())
    finished.models["tiny"]["chat_template"] = "own.jinja"
    assert finished.pending() == set()
    own.write_text("Read: {{ messages[0].content }}")
    summaries = {job for job in SUMMARIES if " tiny" in job}
    assert finished.pending() == summaries
    finished.config["matrix"] = [{"model": "tiny", "recipes": ["fp32"]}]
    finished.succeed()
    assert finished.pending() == set()
    finished.config["evaluation"]["chat"] = False
    finished.succeed()
    own.write_text("Unused: {{ messages[0].content }}")
    assert finished.pending() == set()


def test_new_model(finished):
    finished.models["third"] = finished.models["tiny"]
    assert finished.pending() == set()


def test_lost_result_is_made_again_and_nothing_else(finished):
    (finished.results / "tiny" / "fp32" / "perplexity.json").unlink()
    assert finished.pending() == jobs("perplexity gate rouge", ("tiny/fp32",))


def test_a_change_that_was_run_is_done(finished):
    finished.config["benchmark"]["repeats"] = 2
    finished.config["matrix"] = [{"model": "other", "recipes": ["fp32"]}]
    finished.succeed()
    assert finished.pending() == set()


def test_padding_is_part_of_a_tensorrt_engine(finished_with_tensorrt):
    workspace = finished_with_tensorrt
    workspace.config["build"]["remove_input_padding"] = False
    assert workspace.pending() == jobs(f"tensorrt_engine {AFTER_ENGINE}", ("other/fp32",))


def test_compute_capabilities_are_part_of_a_tensorrt_engine(finished_with_tensorrt):
    workspace = finished_with_tensorrt
    for value in (["8.6"], "auto"):
        workspace.config["build"]["compute_capabilities"] = value
        assert workspace.pending() == jobs(f"tensorrt_engine {AFTER_ENGINE}", ("other/fp32",))


def test_a_tensorrt_engine_that_is_not_asked_for_is_no_reason_to_evaluate_again(finished_with_tensorrt):
    """It stays until its file is removed, and is used no more once the engine is made for something else."""
    workspace = finished_with_tensorrt
    build = workspace.config["build"]
    build["engines"] = ["portable"]
    assert workspace.pending() == set()
    workspace.config["benchmark"]["repeats"] = 2
    assert workspace.pending() == jobs("benchmark", ("other/fp32",))
    workspace.config["benchmark"]["repeats"] = 1
    for change in ({"remove_input_padding": False}, {"compute_capabilities": ["8.6"]}):
        workspace.config["build"] = build | change
        assert workspace.pending() == jobs(AFTER_ENGINE, ("other/fp32",))
    workspace.config["build"] = build
    (workspace.results / "other/fp32/engine/rank0.engine").unlink()
    assert workspace.pending() == jobs(AFTER_ENGINE, ("other/fp32",))


def test_an_engine_of_older_limits_is_not_served(finished_with_tensorrt):
    """A TensorRT engine that an earlier configuration left is no part of an engine without `tensorrt`."""
    workspace = finished_with_tensorrt
    workspace.config["build"] |= {"engines": ["portable"], "max_batch_size": 2}
    workspace.succeed("results/other/fp32/engine/config.json")
    config = (workspace.results / "other/fp32/engine/config.json").read_text()
    assert "rank0.engine" not in config


def test_removing_a_folder_needs_no_other_cleaning(finished):
    shutil.rmtree(finished.results / "other")
    assert finished.pending() == jobs(f"portable_engine {AFTER_ENGINE}", ("other/fp32",)) | {
        "checkpoint other",
        "summarize_hf other",
        "perplexity_hf other",
        "rouge other/hf",
    }
