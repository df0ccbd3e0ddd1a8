"""A model's results as the workflow leaves them: scores that are made up, layers and engines that are real."""

import json
import math
from pathlib import Path

from outlier_models import SAMPLES, calibrated, write_model

from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits
from trtbuild.evaluation.gate import gate
from trtbuild.files import write_json
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Quantization

HOSTILE = "<script>document.title = 'taken'</script> & \"so on\""
STATIC = {
    "dtype": "float16",
    "weights": {"dtype": "int8"},
    "activations": {"dtype": "int8", "per": "tensor", "smoothquant": 0.5},
    "calibration": SAMPLES,
}
# What each run is made of, its perplexity beside the baseline's 20, ms a token, and MB at the peak.
RUNS = {"fp16": (20.02, 4.0, 900.0), "static": (20.1, 2.0, 500.0), "broken": (31.0, 1.0, 400.0)}


def rouge(one: float, long: float, model: str = "12") -> dict:
    means = {"rouge1": one, "rouge2": 9, "rougeL": long, "rougeLsum": 25}
    scores = {
        metric: {"mean": mean, "low": mean - 1, "high": mean + 1, "articles": [mean - 3, mean + 3]}
        for metric, mean in means.items()
    }
    return scores | {"provenance": {"engine": "portable", "dtype": "float32", "source_sha256": model}}


def measured(perplexity: float, model: str = "12", spread: float = 0.01) -> dict:
    """A perplexity of two articles; `spread` is how far each is from it, in nats a token."""
    nll = [100 * (math.log(perplexity) + way * spread) for way in (-1, 1)]
    origin = {"engine": "transformers", "dtype": "float32", "source_sha256": model}
    return {"perplexity": perplexity, "articles": {"nll": nll, "tokens": [100, 100]}, "provenance": origin}


def speed(milliseconds: float, megabytes: float, device: str = "cuda: NVIDIA L4") -> dict:
    """A benchmark.json of a step that takes twice its floor."""
    return {
        **{"batch_size": 1, "input_len": 8, "output_len": 4, "parts": 1},
        "time_to_first_token_s": milliseconds / 100,
        "output_tokens_per_s": 1e3 / milliseconds,
        "time_per_output_token_s": milliseconds / 1e3,
        "time_per_output_token_p90_s": milliseconds / 900,
        "peak_memory_bytes": int(megabytes * 1e6),
        **{"bytes_per_step": 2_000_000, "bandwidth_bytes_per_s": 4e9 / milliseconds},
        **{"floor_per_output_token_s": milliseconds / 2e3, "times_floor": 2.0, "bandwidth_share": 0.5},
        "provenance": {"engine": "portable", "dtype": "float16", "device": device, "source_sha256": "12"},
    }


def write_scores(folder: Path, run: str, perplexity: float, milliseconds: float, megabytes: float) -> None:
    """All of a run's results, but for the scores of one that its gate has stopped; of four articles summaries."""
    theirs = measured(20.0)
    ours = measured(perplexity, spread=0.0101)
    ours["divergence"] = {"mean_kl": 0.00123, "p99_kl": 0.0456, "top1_percent": 97.25, "low": 0.001, "high": 0.0015}
    judged = gate(ours, theirs, 5, "fail")
    write_json(folder / run / "perplexity.json", ours)
    write_json(folder / run / "gate.json", judged)
    write_json(folder / run / "benchmark.json", speed(milliseconds, megabytes))
    write_summaries(folder, run)
    if not judged["above_limit"]:
        write_json(folder / run / "rouge.json", rouge(29.5, 19.25))


def write_task(folder: Path, run: str, accuracy: float) -> None:
    """A task's file, as `trtbuild lm-eval` writes it."""
    scores = {"alias": "quiz", "acc,none": accuracy, "acc_stderr,none": 0.05, "acc_norm,none": accuracy + 0.1}
    write_json(folder / run / "lm_eval/quiz.json", {"task": "quiz", "results": {"quiz": scores}, "provenance": {}})


def write_summaries(folder: Path, run: str) -> None:
    texts = [{"id": f"<{i}>", "summary": f"{HOSTILE} of {run}", "reference": f"What {i} says."} for i in range(6)]
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    (folder / run).mkdir(parents=True, exist_ok=True)
    (folder / run / "summaries.jsonl").write_text(lines, encoding="utf-8")
    write_json(folder / run / "summaries.meta.json", {"engine": "portable", "dtype": "float16", "model": "tiny"})


def write_results(folder: Path) -> dict[str, dict]:
    """Everything of a model: a plain recipe, one whose activations have static scales, one that its gate stopped.

    Returns what `collect` takes.
    """
    checkpoint = write_model(folder / "checkpoint")
    (folder / "calibration").mkdir()
    ranges = calibrated(checkpoint).rename(folder / "calibration/news.npz")
    quantize(checkpoint, folder / "quantized/round-int8-1", Quantization.parse(STATIC), ranges, "cpu")
    runs = {run: {"weights": "quantized/round-int8-1", "calibration": "calibration/news.npz"} for run in RUNS}
    runs["fp16"] = {"weights": "checkpoint"}
    limits = BuildLimits(max_batch_size=1, max_input_len=16, max_output_len=8)
    (folder / "logs").mkdir()
    for log in ("checkpoint.log", "quantize.round-int8-1.log", "calibration.news.log"):
        (folder / "logs" / log).write_text("done\n")
    (folder / "logs/quantize.round-int8-1.tsv").write_text("s\th:m:s\n7.25\t0:00:07\n")
    for run, made_of in runs.items():
        recipe = {"dtype": "float16"} if run == "fp16" else STATIC
        options = {"model": "tiny", "recipe": recipe, "limits": limits, "engines": ["portable"]}
        build_engine_dir(folder / made_of["weights"], folder / run / "engine", **options)
        (folder / run / "logs").mkdir()
        (folder / run / "logs/portable_engine.rank0.tsv").write_text("s\th:m:s\n4.5\t0:00:04\n")
        (folder / run / "logs/perplexity.log").write_text("done\n")
        write_scores(folder, run, *RUNS[run])
    for run, accuracy in (("hf", 0.5), ("static", 0.25)):
        write_task(folder, run, accuracy)
    write_json(folder / "hf/perplexity.json", measured(20.0))
    write_json(folder / "hf/rouge.json", rouge(30, 20))
    write_summaries(folder, "hf")
    for name in ("recipes.json", "recipes.md"):
        (folder / name).touch()
    return runs
