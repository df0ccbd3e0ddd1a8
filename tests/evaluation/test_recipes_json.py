"""All of a model's recipes as data."""

import math
import shutil

import numpy as np
import pytest
from result_files import RUNS, measured, write_results
from safetensors import safe_open

from trtbuild.errors import UserError
from trtbuild.evaluation.gate import gate
from trtbuild.evaluation.recipes import collect, pareto_front, recommended
from trtbuild.files import read_json, write_json


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model's folder and what its runs are made of. Read it."""
    folder = tmp_path_factory.mktemp("recipes") / "results/tiny"
    return folder, write_results(folder)


@pytest.fixture(scope="module")
def data(made):
    return collect(*made)


def of(data: dict, name: str) -> dict:
    (found,) = (run for run in data["runs"] if run["run"] == name)
    return found


def test_a_run_has_its_results(made, data):
    folder, _ = made
    run = of(data, "static")
    assert (data["model"], [run["run"] for run in data["runs"]], data["baseline"]["run"]) == ("tiny", [*RUNS], "hf")
    assert run["gate"] == read_json(folder / "static/gate.json")
    assert run["provenance"]["benchmark"]["device"] == "cuda: NVIDIA L4"
    assert run["benchmark"] | {"provenance": run["provenance"]["benchmark"]} == read_json(
        folder / "static/benchmark.json"
    )
    assert run["divergence"]["mean_kl"] == 0.00123
    # Two articles at 0.0101 nats on either side: t of one degree of freedom, 12.706, times 0.0101.
    half = math.exp(12.7062 * 0.0101)
    assert run["perplexity"] == pytest.approx({"value": 20.1, "low": 20.1 / half, "high": 20.1 * half}, rel=1e-5)
    assert run["rouge"]["rouge1"] == {
        **{"mean": 29.5, "low": 28.5, "high": 30.5},
        "difference": {"mean": -0.5, "low": -0.5, "high": -0.5},
    }
    assert run["seconds"] == {"build": 4.5, "quantize": 7.25}
    assert "rouge" not in of(data, "broken")  # its gate stopped it
    assert "gate" not in data["baseline"]


def test_parts_are_all_of_an_engine(made, data):
    for run in ("fp16", "static"):
        with safe_open(made[0] / run / "engine/rank0.safetensors", "pt") as file:
            sizes = {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118 (no mapping)
        parts = of(data, run)["engine"]["parts"]
        assert sum(parts.values()) == sum(sizes.values())
        assert parts["embedding"] == sizes["model.embed_tokens.weight"]
        assert parts["MLP"] == sum(size for name, size in sizes.items() if ".mlp." in name)


def test_accuracy_tasks(made, data, tmp_path):
    """The normalized accuracy where there is one, within 1.96 standard errors; nothing where it has none."""
    assert of(data, "static")["lm_eval"] == {"quiz": {"metric": "acc_norm", "value": 0.35, "low": None, "high": None}}
    assert data["baseline"]["lm_eval"]["quiz"]["value"] == 0.6
    assert "lm_eval" not in of(data, "fp16")
    scores = {"alias": "quiz", "f1,none": 0.5, "f1_stderr,none": 0.1, "other,none": 1.0}
    write_json(tmp_path / "hf/lm_eval/quiz.json", {"groups": {"quiz": scores}, "results": {"part": {}}})
    expected = {"metric": "f1", "value": 0.5, "low": pytest.approx(0.304), "high": pytest.approx(0.696)}
    assert collect(tmp_path, {})["baseline"]["lm_eval"]["quiz"] == expected
    write_json(tmp_path / "hf/lm_eval/quiz.json", {"results": {"quiz": {"alias": "quiz"}}})
    with pytest.raises(UserError, match=r"lm_eval/quiz\.json holds no score of quiz"):
        collect(tmp_path, {})


def test_predictions(made, data):
    """Weights to the byte; the floor at an L4's 300 GB/s; nothing of a device that is not known."""
    for name in ("fp16", "static"):
        run = of(data, name)
        assert run["predicted"]["weight_bytes"] == run["engine"]["weight_bytes"]
        assert run["predicted"]["peak_memory_bytes"] > run["predicted"]["weight_bytes"]
    # An average step reads the weights, and of 2 layers, 2 x 2 heads of 16 channels in float16, 8 + 4 / 2 positions.
    read = of(data, "fp16")["engine"]["weight_bytes"] - of(data, "fp16")["engine"]["parts"]["embedding"]
    assert of(data, "fp16")["predicted"]["floor_per_output_token_s"] == pytest.approx(
        (read + 10 * 2 * 2 * 2 * 16 * 2) / 300e9, rel=1e-3
    )


def test_files_are_there_with_their_times(made, data):
    folder, _ = made
    files = of(data, "static")["files"]
    assert {"static/gate.json", "static/summaries.jsonl", "static/engine/config.json"} < files.keys()
    assert {"static/logs/perplexity.log", "logs/quantize.round-int8-1.log", "logs/calibration.news.log"} < files.keys()
    assert not [path for path in files if not (folder / path).is_file()]
    assert "logs/calibration.news.log" not in of(data, "fp16")["files"]


def test_layers_of_static_activations(made, data):
    """Which channels become zeros, from the arrays that calibration and smoothing left, by rounding them."""
    folder, _ = made
    ranges = np.load(folder / "calibration/news.npz")
    factors = np.load(folder / "quantized/round-int8-1/smoothing.npz")
    layers = of(data, "static")["layers"]
    zeroed = []
    for i in range(2):
        name = f"model.layers.{i}.mlp.down_proj"
        x = ranges[f"{name}.input"] / factors[name]
        zeroed.append(100 * np.mean(np.round(x / (x.max() / 127)) == 0))
    assert layers["zeroed_percent"]["mlp.down_proj"] == pytest.approx(zeroed)
    assert layers["zeroed_percent"].keys() == {
        *("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    }
    said = read_json(folder / "quantized/round-int8-1/quantization.json")["relative_errors"]
    assert layers["relative_errors"]["self_attn.q_proj"] == pytest.approx(
        [said[f"model.layers.{i}.self_attn.q_proj"] for i in range(2)], rel=1e-3
    )
    assert of(data, "fp16")["layers"] == {}
    inputs = data["calibrations"]["calibration/news.npz"]["ranges"]["self_attn.qkv_proj"]
    x = ranges["model.layers.1.self_attn.qkv_proj.input"]
    assert inputs["max"][1] == pytest.approx(x.max(), rel=1e-3)
    assert inputs["median"][1] == pytest.approx(np.sort(x)[len(x) // 2 - 1], rel=1e-3)


def test_five_articles_with_every_runs_summary(data):
    assert [article["id"] for article in data["articles"]] == [f"<{i}>" for i in range(5)]
    assert data["articles"][0]["summaries"].keys() == {"hf", *RUNS}


def test_what_is_gone_is_left_out(made, data, tmp_path):
    """As where somebody made room: engines, quantized weights, calibration, checkpoint, logs."""
    folder = shutil.copytree(made[0], tmp_path / "results/tiny")
    gone = "checkpoint", "quantized", "calibration", "logs", "static/logs"
    for name in (*gone, "static/engine/rank0.safetensors", "hf/summaries.jsonl"):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    left = collect(folder, made[1])
    run = of(left, "static")
    assert (run["engine"]["parts"], run["layers"], left["calibrations"]) == ({}, {}, {})
    assert (of(data, "static")["seconds"].keys(), run["seconds"]) == ({"quantize", "build"}, {})
    assert left["articles"][0]["summaries"].keys() == {*RUNS}


# Which one to deploy


def run(name: str, increase: float, milliseconds: float, megabytes: float, **changes) -> dict:
    """What a choice depends on; `high` is 0.1 above the increase."""
    value = {
        **{"run": name, "layout": "", "gate": {"increase_percent": increase, "high": increase + 0.1}},
        "benchmark": {"time_per_output_token_s": milliseconds / 1e3, "peak_memory_bytes": int(megabytes * 1e6)},
        "engine": {"recipe": {"dtype": name} if name.startswith(("float", "bfloat")) else {"dtype": "float16", "x": 1}},
        "provenance": {"benchmark": {"device": "cuda"}},
    }
    value["gate"]["above_limit"] = changes.pop("above_limit", False)
    return value | changes


PLAIN = run("float16", 0.0, 4, 14_000)


def chosen(*runs: dict) -> tuple[list[str], str, str]:
    front = pareto_front([*runs])
    best = recommended([*runs], front)
    return front, best["run"], best["reason"]


def test_the_fastest_within_one_per_cent_is_recommended():
    good, coarse = run("int8", 0.8, 2, 23_900), run("int4", 6.0, 1.5, 9_000)
    slow = run("slow", 0.85, 2.1, 24_000)  # worse than int8 in everything
    assert chosen(PLAIN, slow, coarse, good) == (
        ["int4", "int8", "float16"],
        "int8",
        "fits 24 GB, +0.8% perplexity, 2 x float16",
    )


def test_speed_is_that_beside_the_fastest_unquantized_recipe():
    """float16 is slow on CPUs; and a median that one step in ten does not reach is no gain."""
    int8, faster = run("int8", 0.5, 2, 8_000), run("float32", 0.0, 3, 28_000)
    assert chosen(PLAIN, faster, int8)[1:] == ("int8", "fits 8 GB, +0.5% perplexity, 1.5 x float32")
    int8["benchmark"]["time_per_output_token_p90_s"] = 3.1e-3
    assert chosen(PLAIN, faster, int8)[1:] == ("int8", "fits 8 GB, +0.5% perplexity, as fast as float32")
    assert chosen(PLAIN, int8)[1:] == ("int8", "fits 8 GB, +0.5% perplexity, 2 x float16")


def test_nothing_is_lower_by_nothing():
    assert "+0.0% perplexity" in chosen(run("float16", -0.00001, 4, 14_000))[2]


def test_the_interval_counts_not_the_estimate():
    front, best, reason = chosen(PLAIN, run("int8", 0.95, 2, 8_000))
    assert (front, best) == (["int8", "float16"], "float16")
    assert reason == "fits 16 GB, +0.0% perplexity, nothing quantized within 1% is faster"


def test_what_is_above_its_limit_is_neither():
    assert chosen(PLAIN, run("int8", 0.5, 2, 8_000, above_limit=True))[:2] == (["float16"], "float16")


def test_none_within_one_per_cent():
    runs = [run("int8", 4.0, 2, 8_000), run("int4", 9.0, 1, 4_000), run("bfloat16", 3.0, 4, 14_000)]
    assert chosen(*runs)[1:] == ("bfloat16", "fits 16 GB, +3.0% perplexity, no recipe is within 1%")


def test_other_devices_and_layouts_are_not_compared():
    """Those of the device that most were measured on make the front; times of another layout are no measure."""
    other = run("int8", 0.1, 0.1, 100, provenance={"benchmark": {"device": "cpu"}})
    assert chosen(PLAIN, run("int4", 5.0, 1, 4_000), other)[0] == ["int4", "float16"]
    assert chosen(PLAIN, run("int8@tp2", 0.5, 1, 4_000, layout="tp2"))[1:] == (
        "int8@tp2",
        "fits 8 GB a rank, +0.5% perplexity",
    )


def test_nothing_measured():
    assert pareto_front([]) == []
    unmeasured = run("int8", 0.1, 1, 1) | {"benchmark": {}}
    assert recommended([unmeasured], pareto_front([unmeasured])) is None


def test_equal_ones_are_both_on_the_front():
    assert pareto_front([PLAIN, PLAIN | {"run": "again"}]) == ["float16", "again"]


def test_a_gate_without_an_interval(tmp_path):
    """Of a single article."""
    one = measured(20.0)
    one["articles"] = {"nll": [100 * math.log(20.0)], "tokens": [100]}
    write_json(tmp_path / "hf/perplexity.json", one)
    write_json(tmp_path / "fp16/perplexity.json", one)
    write_json(tmp_path / "fp16/gate.json", gate(one, one, 5, "fail"))
    found = of(collect(tmp_path, {"fp16": {"weights": "checkpoint"}}), "fp16")
    assert found["perplexity"] == {"value": 20.0, "low": None, "high": None}
