"""`recipes.json`: what is known of a model's recipes, side by side. Its table and its page are made of this alone."""

import csv
import math
from collections import Counter
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.memory import OTHERS, needed
from trtbuild.engine.portable import read_portable
from trtbuild.errors import UserError
from trtbuild.evaluation import layers
from trtbuild.evaluation.floor import decode_floor
from trtbuild.evaluation.gate import GATE, PERPLEXITY
from trtbuild.evaluation.gpu_table import GPUS, known
from trtbuild.evaluation.paired import mean_nll
from trtbuild.evaluation.provenance import refuse_different
from trtbuild.evaluation.rouge import METRICS, SHAPE, difference
from trtbuild.evaluation.summarization import read_summaries
from trtbuild.files import check_shape, read_json, read_text
from trtbuild.layout import split_run
from trtbuild.models.config import ModelConfig
from trtbuild.quantization.declared import declared_network
from trtbuild.quantization.recipe import Recipe

RESULTS: dict[str, dict] = {
    "perplexity": PERPLEXITY,
    "gate": GATE,
    "rouge": SHAPE,
    "benchmark": {"peak_memory_bytes": int},
}
TASK_METRICS = ("acc_norm", "acc", "exact_match")
Z = 1.96  # standard errors on either side, of 95%
DIVERGENCE = dict.fromkeys(("mean_kl", "p99_kl", "top1_percent"), float)
KINDS = {".safetensors": "portable", ".engine": "tensorrt"}  # of engine files
PARTS = {"embed_tokens": "embedding", "lm_head": "output product", "self_attn": "attention", "mlp": "MLP"}
ARTICLES = 5  # whose summaries are shown side by side
ACCEPTABLE = 1.0  # per cent of perplexity: what the gate allows a recipe that quantizes nothing
MEMORIES = (8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 141, 192)  # GB, of GPUs as they are sold


def collect(folder: Path, runs: dict[str, dict[str, str]]) -> dict:
    """The content of `recipes.json` (docs/formats.md), of what is there under `folder`, `results/{model}`.

    `runs` maps a recipe, or one on a layout, to what its engine is made of, relative to `folder`: `weights`, a folder,
    and `calibration`, a file, if any. Raises `UserError` for results of another model, text or prompt than the Hugging
    Face model's.
    """
    theirs = _results(folder / "hf")
    checkpoint = folder / "checkpoint"
    original = Checkpoint(checkpoint) if checkpoint.exists() else None
    found = [_run(folder, run, made_of, theirs, original) for run, made_of in runs.items()]
    calibrations = sorted({made_of["calibration"] for made_of in runs.values() if "calibration" in made_of})
    front = pareto_front(found)
    return {
        "model": folder.as_posix().rpartition("results/")[2],
        **({"rehearsal": True} if "rehearsal" in theirs.get("perplexity", {}) else {}),
        "baseline": _run(folder, "hf", {}, {}, original),
        "runs": found,
        "front": front,
        "recommended": recommended(found, front),
        "calibrations": {
            path: layers.ranges(folder / path, original)
            for path in calibrations
            if original and (folder / path).exists()
        },
        "articles": _articles(folder, ["hf", *runs]),
    }


def pareto_front(runs: list[dict]) -> list[str]:
    """The runs than which none is better in one of perplexity, time a token and memory, and as good in the others.

    Those of one device and one size of benchmark, that most have; without what is above its gate's limit. The fastest
    comes first.
    """
    known = {run["run"]: numbers for run in runs if (numbers := _numbers(run)) and not run["gate"]["above_limit"]}
    measured = {run["run"]: _measured_on(run) for run in runs if run["run"] in known}
    most = max(measured.values(), key=list(measured.values()).count, default=None)
    known = {run: numbers for run, numbers in known.items() if measured[run] == most}
    front = [run for run, ours in known.items() if not any(_beats(theirs, ours) for theirs in known.values())]
    return sorted(front, key=lambda run: known[run][0])


def recommended(runs: list[dict], front: list[str]) -> dict | None:
    """Of the front the fastest whose perplexity is, for all that is known, at most `ACCEPTABLE` higher, and why.

    Where there is none, the one whose perplexity is lowest. Times are compared with those of the fastest plain recipe
    on the same layout; a gain that one step in ten does not have is none.
    """
    by_name = {run["run"]: run for run in runs}
    good = [run for run in front if _at_most(by_name[run]["gate"]) <= ACCEPTABLE]
    if not front:
        return None
    name = good[0] if good else min(front, key=lambda run: by_name[run]["gate"]["increase_percent"])
    run = by_name[name]
    time, memory = run["benchmark"]["time_per_output_token_s"], run["benchmark"]["peak_memory_bytes"]
    fits = next((size for size in MEMORIES if memory <= size * 1e9), None)
    reasons = [f"fits {fits} GB" + (" a rank" if run["layout"] else "")] if fits else []
    reasons.append(f"{run['gate']['increase_percent']:+z.1f}% perplexity")
    plain = [other for other in runs if _is_plain(other) and other["layout"] == run["layout"] and _numbers(other)]
    plain = [other for other in plain if other is not run and _measured_on(other) == _measured_on(run)]
    if _is_plain(run) and good:
        reasons.append(f"nothing quantized within {ACCEPTABLE:g}% is faster")
    elif other := min(plain, key=lambda other: other["benchmark"]["time_per_output_token_s"], default=None):
        dtype, theirs = other["engine"]["recipe"]["dtype"], other["benchmark"]["time_per_output_token_s"]
        told_apart = run["benchmark"].get("time_per_output_token_p90_s", time) < theirs or theirs < time
        reasons.append(f"{theirs / time:.2g} x {dtype}" if told_apart else f"as fast as {dtype}")
    if not good:
        reasons.append(f"no recipe is within {ACCEPTABLE:g}%")
    return {"run": name, "reason": ", ".join(reasons)}


def _numbers(run: dict) -> tuple[float, float, int] | None:
    """What recipes are chosen by: seconds a token, per cent of perplexity, bytes; the less the better."""
    benchmark, gate = run.get("benchmark", {}), run.get("gate")
    time = benchmark.get("time_per_output_token_s")
    return (time, gate["increase_percent"], benchmark["peak_memory_bytes"]) if time and gate else None


def _measured_on(run: dict) -> tuple:
    """Times are comparable where this is equal."""
    sizes = (run["benchmark"].get(key) for key in ("batch_size", "input_len", "output_len"))
    return run["provenance"].get("benchmark", {}).get("device"), *sizes


def _beats(ours: tuple, theirs: tuple) -> bool:
    return ours != theirs and all(a <= b for a, b in zip(ours, theirs, strict=True))


def _at_most(gate: dict) -> float:
    """The increase of perplexity that is not exceeded, for all that is known."""
    high = gate.get("high")
    return gate["increase_percent"] if high is None else high


def _is_plain(run: dict) -> bool:
    """Whether nothing is quantized."""
    return run.get("engine", {}).get("recipe", {}).keys() == {"dtype"}


def _results(folder: Path) -> dict[str, dict]:
    """The results of a run that are there, by name."""
    files = {name: folder / f"{name}.json" for name in RESULTS}
    return {name: read_json(file, RESULTS[name]) for name, file in files.items() if file.exists()}


def _run(
    folder: Path, run: str, made_of: dict[str, str], baseline: dict[str, dict], original: Checkpoint | None
) -> dict:
    results = _results(folder / run)
    for name in results.keys() & baseline.keys() & {"perplexity", "rouge"}:
        try:
            refuse_different([results[name], baseline[name]])
        except UserError as error:
            raise UserError(f"{folder / run} and {folder / 'hf'}: {error}") from None
    recipe, layout = split_run(run)
    found: dict = {"run": run, "recipe": recipe, "layout": layout.removeprefix("@")}
    if perplexity := results.get("perplexity"):
        low, high = map(math.exp, mean_nll(perplexity).interval)
        known = len(perplexity["articles"]["tokens"]) > 1
        found["perplexity"] = {
            "value": perplexity["perplexity"],
            "low": low if known else None,
            "high": high if known else None,
        }
        if divergence := perplexity.get("divergence"):
            check_shape(divergence, DIVERGENCE, f"{folder / run / 'perplexity.json'}: divergence")
            found["divergence"] = {key: value for key, value in divergence.items() if key != "baseline"}
    if "gate" in results:
        found["gate"] = results["gate"]
    if rouge := results.get("rouge"):
        differences = difference(rouge, baseline["rouge"]) if "rouge" in baseline else None
        found["rouge"] = {
            metric: {key: rouge[metric][key] for key in ("mean", "low", "high")}
            | ({"difference": differences[metric]} if differences else {})
            for metric in METRICS
        }
    if benchmark := results.get("benchmark"):
        found["benchmark"] = {key: value for key, value in benchmark.items() if key != "provenance"}
    if tasks := sorted((folder / run / "lm_eval").glob("*.json")):
        found["lm_eval"] = {task.stem: _task(task) for task in tasks}
    found |= _engine(folder, run, made_of, original, results.get("benchmark", {}))
    found["provenance"] = {name: result["provenance"] for name, result in results.items() if "provenance" in result}
    found["files"] = _files(folder, run, made_of)
    return found


def _task(path: Path) -> dict:
    """A task's score, as lm-evaluation-harness has it: of `TASK_METRICS` the first, else the file's first."""
    result = read_json(path, {"results": dict})
    scores: dict[str, float] = {}
    for name, value in (result.get("groups", {}).get(path.stem) or result["results"].get(path.stem, {})).items():
        metric, _, way = name.partition(",")
        if way and isinstance(value, float | int):
            scores.setdefault(metric, value)
    found = next((metric for metric in (*TASK_METRICS, *scores) if metric in scores), None)
    if found is None:
        raise UserError(f"{path} holds no score of {path.stem}; make it again")
    value, error = scores[found], scores.get(f"{found}_stderr")
    low, high = (None, None) if error is None else (value - Z * error, value + Z * error)
    return {"metric": found, "value": value, "low": low, "high": high}


def _engine(folder: Path, run: str, made_of: dict[str, str], original: Checkpoint | None, benchmark: dict) -> dict:
    """Its recipe, bytes and parts; seconds that it took; what calibration and quantization say of its layers."""
    config = folder / run / "engine" / "config.json"
    if not config.exists():
        return {}
    content = read_json(config, {"outputs": dict, "recipe": {"dtype": str}})
    recipe = Recipe.parse(content["recipe"])
    sizes: Counter[str] = Counter()
    for name, output in content["outputs"].items():
        sizes[KINDS[Path(name).suffix]] += output["bytes"]
    engine = {"recipe": content["recipe"], "bytes": dict(sizes), "parts": _parts(config.parent, content["outputs"])}
    engine["weight_bytes"] = sum(engine["parts"].values()) or None
    weights, calibration = made_of["weights"], made_of.get("calibration")
    quantize = folder / "logs" / f"quantize.{Path(weights).name}.tsv"
    logs = [f"{KINDS[Path(name).suffix]}_engine.{Path(name).stem}.tsv" for name in content["outputs"]]
    built = [folder / run / "logs" / log for log in logs]
    seconds = {"build": sum(map(_seconds, built))} if all(log.exists() for log in built) else {}
    if weights != "checkpoint" and quantize.exists():
        seconds["quantize"] = _seconds(quantize)
    of_layers = layers.quantized(folder / weights, folder / calibration if calibration else None, original)
    found = {"engine": engine, "seconds": seconds, "calibration": calibration, "layers": of_layers}
    if original and not recipe.quant_checkpoint and {"mapping", "limits"} <= content.keys():
        found["predicted"] = _predicted(original.config, recipe, content, benchmark)
    return found


def _predicted(model: ModelConfig, recipe: Recipe, engine: dict, benchmark: dict) -> dict[str, float]:
    """From shapes alone, under the names of what was measured.

    On a GPU that is known also the peak of memory, at the engine's limits, and the floor at the published bandwidth.
    """
    first = Mapping(**engine["mapping"])
    mapping, limits = first.ranks, BuildLimits(**engine["limits"])
    stages = [declared_network(model, recipe, rank, limits.max_length) for rank in mapping[:: first.tp_size]]
    memory = [needed(stage, limits) for stage in stages]
    found: dict[str, float] = {"weight_bytes": first.tp_size * sum(stage.weights for stage in memory)}
    if gpu := known(benchmark.get("provenance", {}).get("device", "")):
        found["peak_memory_bytes"] = max(stage.total for stage in memory) - OTHERS  # which torch does not count
        sizes = {key: benchmark[key] for key in ("batch_size", "input_len", "output_len")}
        found["floor_per_output_token_s"] = decode_floor(stages, first, GPUS[gpu], **sizes)
    return found


def _parts(folder: Path, outputs: Iterable[str]) -> dict[str, int]:
    """Bytes of all ranks' portable engines by part of the model; nothing where they are gone."""
    files = [folder / name for name in outputs if KINDS[Path(name).suffix] == "portable"]
    sizes: Counter[str] = Counter()
    for file in files if all(file.exists() for file in files) else []:
        for name, constant in read_portable(file)[0].constants.items():
            part = next((part for word, part in PARTS.items() if word in name.split(".")), "norms and tables")
            sizes[part] += constant.nbytes
    return dict(sizes)


def _seconds(path: Path) -> float:
    """Wall time in a file that Snakemake's `benchmark` wrote."""
    try:
        return float(next(csv.DictReader(read_text(path).splitlines(), delimiter="\t"))["s"])
    except (csv.Error, StopIteration, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no time; make it again with snakemake --forcerun") from error


def _files(folder: Path, run: str, made_of: dict[str, str]) -> dict[str, str]:
    """When each of the run's results and logs, and of the logs of what it is made of, was written; UTC."""
    patterns = [f"{run}/*.json", f"{run}/*.jsonl", f"{run}/*.md", f"{run}/engine/config.json", f"{run}/logs/*.log"]
    patterns.append("logs/checkpoint.log")
    if "weights" in made_of:
        patterns.append(f"logs/quantize.{Path(made_of['weights']).name}.log")
    if "calibration" in made_of:
        patterns.append(f"logs/calibration.{Path(made_of['calibration']).stem}.log")
    paths = [path for pattern in patterns for path in sorted(folder.glob(pattern))]
    times = {path: datetime.fromtimestamp(int(path.stat().st_mtime), UTC) for path in paths}
    return {path.relative_to(folder).as_posix(): f"{time:%Y-%m-%dT%H:%M:%SZ}" for path, time in times.items()}


def _articles(folder: Path, runs: list[str]) -> list[dict]:
    """The first ones, with every run's summary."""
    files = {run: folder / run / "summaries.jsonl" for run in runs}
    records = {run: read_summaries(file)[0][:ARTICLES] for run, file in files.items() if file.exists()}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for run, of_run in records.items():
        for i, record in enumerate(of_run):
            article = str(record.get("id", i)), record["reference"]
            found.setdefault(article, {})[run] = record["summary"]
    return [{"id": id, "reference": reference, "summaries": all_} for (id, reference), all_ in found.items()]
