"""A model's recipes side by side, as a Markdown table."""

import csv
from collections import Counter
from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.evaluation.gate import PERPLEXITY
from trtbuild.evaluation.provenance import refuse_different
from trtbuild.evaluation.rouge import SHAPE
from trtbuild.files import read_json, read_text

HEADER = (
    ("recipe", "---"),
    ("perplexity", "---:"),
    ("increase %", "---:"),
    ("ROUGE-1", "---:"),
    ("ROUGE-L", "---:"),
    ("portable MB", "---:"),
    ("TensorRT MB", "---:"),
    ("quantize s", "---:"),
    ("build s", "---:"),
)


def recipe_table(folder: Path, recipes: dict[str, str]) -> str:
    """Quality, engine bytes and build times under `folder`, `results/{model}`.

    `recipes` maps a recipe, or one on a layout, to the folder that its weights come from, relative to `folder`.
    Increases are over the Hugging Face model's perplexity; bytes are those of all ranks, and times those of the rules
    (`logs/*.tsv`), quantization and, all ranks' together, build. Raises
    `UserError` for results that are missing, or of another model, text or prompt than the Hugging Face model's.
    """
    measured, hf = _results(folder / "hf")
    baseline = measured["perplexity"]
    rows = [
        (
            f"{_baseline(hf['provenance'])}, {hf['provenance']['dtype']}",
            f"{baseline:.2f}",
            "",
            _score(hf, "rouge1"),
            _score(hf, "rougeL"),
            *[""] * 4,
        )
    ]
    for recipe, weights in recipes.items():
        ours, rouge = _results(folder / recipe)
        perplexity = ours["perplexity"]
        try:
            refuse_different([ours, measured])
            refuse_different([rouge, hf])
        except UserError as error:
            raise UserError(f"{folder / recipe} and {folder / 'hf'}: {error}") from None
        outputs = read_json(folder / recipe / "engine" / "config.json", {"outputs": dict})["outputs"]
        sizes: Counter[str] = Counter()
        for name, output in outputs.items():
            sizes[Path(name).suffix] += output["bytes"]
        quantize = folder / "logs" / f"quantize.{Path(weights).name}.tsv" if weights != "checkpoint" else None
        logs = folder / recipe / "logs"
        kinds = {".safetensors": "portable", ".engine": "tensorrt"}
        builds = [logs / f"{kinds[Path(name).suffix]}_engine.{Path(name).stem}.tsv" for name in outputs]
        rows.append(
            (
                recipe,
                f"{perplexity:.2f}",
                f"{100 * (perplexity / baseline - 1):+.2f}",
                _score(rouge, "rouge1"),
                _score(rouge, "rougeL"),
                *(f"{sizes[suffix] / 1e6:.1f}" if sizes[suffix] else "" for suffix in kinds),
                f"{_seconds(quantize):.0f}" if quantize and quantize.exists() else "",
                f"{sum(map(_seconds, builds)):.0f}",
            )
        )
    lines = ["**Rehearsal**: dummy weights, no results.", ""] if "rehearsal" in measured else []
    lines += ["| " + " | ".join(cells) + " |" for cells in (*zip(*HEADER, strict=True), *rows)]
    return "\n".join(lines) + "\n"


def _results(folder: Path) -> tuple[dict, dict]:
    return read_json(folder / "perplexity.json", PERPLEXITY), read_json(folder / "rouge.json", SHAPE)


def _baseline(origin: dict) -> str:
    return f"portable engine ({origin['baseline']})" if "baseline" in origin else "Hugging Face"


def _score(result: dict, metric: str) -> str:
    return f"{result[metric]['mean']:.2f}"


def _seconds(path: Path) -> float:
    """Wall time in a file that Snakemake's `benchmark` wrote."""
    try:
        return float(next(csv.DictReader(read_text(path).splitlines(), delimiter="\t"))["s"])
    except (csv.Error, StopIteration, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds no time; make it again with snakemake --forcerun") from error
