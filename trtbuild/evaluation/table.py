"""A model's recipes side by side, as a Markdown table."""

import csv
from collections import Counter
from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.evaluation.gate import GATE, PERPLEXITY, increase
from trtbuild.evaluation.provenance import refuse_different
from trtbuild.evaluation.rouge import SHAPE, difference
from trtbuild.files import check_shape, read_json, read_text

RESULTS: dict[str, dict] = {
    "perplexity": PERPLEXITY,
    "gate": GATE,
    "rouge": SHAPE,
    "benchmark": {"peak_memory_bytes": int},
}
NUMBERS = (
    *("perplexity", "increase %", "mean KL", "p99 KL", "same token %"),
    *("ROUGE-1", "ROUGE-1 difference", "ROUGE-L", "ROUGE-L difference"),
    *("ms a token", "peak MB", "portable MB", "TensorRT MB", "quantize s", "build s"),
)
KINDS = {".safetensors": "portable", ".engine": "tensorrt"}  # of engine files


def recipe_table(folder: Path, recipes: dict[str, str]) -> str:
    """Quality, speed, memory, engine bytes and build times under `folder`, `results/{model}`; empty what is not there.

    `recipes` maps a recipe, or one on a layout, to the folder that its weights come from, relative to `folder`.
    Increases are over the Hugging Face model's perplexity, KL divergences (nats) from its next-token distributions, and
    ROUGE's differences from its scores, with 95% intervals; a token's time and the peak of memory are those of
    `benchmark.json`; bytes are those of all ranks, and times those of the rules (`logs/*.tsv`), quantization and, all
    ranks' together, build. Raises `UserError` for results of another model, text or prompt than the Hugging Face
    model's.
    """
    baseline = _results(folder / "hf")
    rows = [(_baseline(baseline), "", *_quality(baseline), *_rouge(baseline, {}), *[""] * 6)]
    for recipe, weights in recipes.items():
        results = _results(folder / recipe)
        for name in ("perplexity", "rouge"):
            try:
                if name in results and name in baseline:
                    refuse_different([results[name], baseline[name]])
            except UserError as error:
                raise UserError(f"{folder / recipe} and {folder / 'hf'}: {error}") from None
        verdict = results["gate"]["verdict"] if "gate" in results else ""
        row = recipe, verdict, *_quality(results), *_rouge(results, baseline)
        rows.append((*row, *_speed(results.get("benchmark", {})), *_engine(folder, recipe, weights)))
    lines = ["**Rehearsal**: dummy weights, no results.", ""] if "rehearsal" in baseline.get("perplexity", {}) else []
    header = ("recipe", "gate", *NUMBERS), ("---", "---", *["---:"] * len(NUMBERS))
    lines += ["| " + " | ".join(cells) + " |" for cells in (*header, *rows)]
    return "\n".join(lines) + "\n"


def _results(folder: Path) -> dict[str, dict]:
    """The results of a run that are there, by name."""
    files = {name: folder / f"{name}.json" for name in RESULTS}
    return {name: read_json(file, RESULTS[name]) for name, file in files.items() if file.exists()}


def _baseline(results: dict[str, dict]) -> str:
    origin = next(iter(results.values()), {}).get("provenance", {})
    name = f"portable engine ({origin['baseline']})" if "baseline" in origin else "Hugging Face"
    return f"{name}, {origin['dtype']}" if "dtype" in origin else name


def _quality(results: dict[str, dict]) -> tuple[str, ...]:
    return (
        f"{results['perplexity']['perplexity']:.2f}" if "perplexity" in results else "",
        increase(results["gate"]).replace("%", "") if "gate" in results else "",
        *_divergence(results.get("perplexity", {}).get("divergence")),
    )


def _rouge(results: dict[str, dict], baseline: dict[str, dict]) -> tuple[str, ...]:
    """ROUGE-1 and its difference from the baseline's, article by article; the same of ROUGE-L."""
    if "rouge" not in results:
        return ("",) * 4
    differences = difference(results["rouge"], baseline["rouge"]) if "rouge" in baseline else None
    cells: list[str] = []
    for metric in ("rouge1", "rougeL"):
        d = differences and differences[metric]
        cells += [
            f"{results['rouge'][metric]['mean']:.2f}",
            f"{d['mean']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" if d else "",
        ]
    return tuple(cells)


def _divergence(divergence: dict | None) -> tuple[str, str, str]:
    """Nats, and the share of tokens for which both models find the same one most likely."""
    if divergence is None:
        return "", "", ""
    check_shape(divergence, dict.fromkeys(("mean_kl", "p99_kl", "top1_percent"), float), "a perplexity's divergence")
    return f"{divergence['mean_kl']:.3g}", f"{divergence['p99_kl']:.3g}", f"{divergence['top1_percent']:.1f}"


def _speed(benchmark: dict) -> tuple[str, str]:
    token, memory = benchmark.get("time_per_output_token_s"), benchmark.get("peak_memory_bytes")
    milliseconds = f"{1e3 * token:.2f}" if isinstance(token, float) else ""
    return milliseconds, f"{(memory + 500_000) // 1_000_000}" if memory else ""


def _engine(folder: Path, recipe: str, weights: str) -> tuple[str, ...]:
    """Megabytes of each kind of engine, seconds of quantization and build."""
    config = folder / recipe / "engine" / "config.json"
    outputs = read_json(config, {"outputs": dict})["outputs"] if config.exists() else {}
    sizes: Counter[str] = Counter()
    for name, output in outputs.items():
        sizes[Path(name).suffix] += output["bytes"]
    quantize = folder / "logs" / f"quantize.{Path(weights).name}.tsv" if weights != "checkpoint" else None
    logs = folder / recipe / "logs"
    builds = [logs / f"{KINDS[Path(name).suffix]}_engine.{Path(name).stem}.tsv" for name in outputs]
    return (
        *(f"{sizes[suffix] / 1e6:.1f}" if sizes[suffix] else "" for suffix in KINDS),
        f"{_seconds(quantize):.0f}" if quantize and quantize.exists() else "",
        f"{sum(map(_seconds, builds)):.0f}" if builds else "",
    )


def _seconds(path: Path) -> float:
    """Wall time in a file that Snakemake's `benchmark` wrote."""
    try:
        return float(next(csv.DictReader(read_text(path).splitlines(), delimiter="\t"))["s"])
    except (csv.Error, StopIteration, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no time; make it again with snakemake --forcerun") from error
