"""A model's recipes side by side, as a Markdown table."""

from trtbuild.evaluation.gate import increase

NUMBERS = (
    *("perplexity", "increase %", "mean KL", "p99 KL", "same token %"),
    *("ROUGE-1", "ROUGE-1 difference", "ROUGE-L", "ROUGE-L difference"),
    *("ms a token", "peak MB", "portable MB", "TensorRT MB", "quantize s", "build s"),
)


def recipe_table(data: dict) -> str:
    """Quality, speed, memory, engine bytes and build times of a `recipes.json`; empty what is not there.

    Increases are over the Hugging Face model's perplexity, KL divergences (nats) from its next-token distributions, and
    ROUGE's differences from its scores, with 95% intervals; a token's time and the peak of memory are those of
    `benchmark.json`; bytes are those of all ranks, and times those of the rules, quantization and, all ranks' together,
    build.
    """
    rows = [(baseline_name(data["baseline"]), *_row(data["baseline"])[1:]), *map(_row, data["runs"])]
    lines = ["**Rehearsal**: dummy weights, no results.", ""] if "rehearsal" in data else []
    header = ("recipe", "gate", *NUMBERS), ("---", "---", *["---:"] * len(NUMBERS))
    lines += ["| " + " | ".join(cells) + " |" for cells in (*header, *rows)]
    return "\n".join(lines) + "\n"


def baseline_name(baseline: dict) -> str:
    """What the recipes are compared with."""
    origin: dict = next(iter(baseline["provenance"].values()), {})
    name = f"portable engine ({origin['baseline']})" if "baseline" in origin else "Hugging Face"
    return f"{name}, {origin['dtype']}" if "dtype" in origin else name


def _row(run: dict) -> tuple[str, ...]:
    gate, divergence, benchmark = (run.get(key, {}) for key in ("gate", "divergence", "benchmark"))
    sizes, seconds = run.get("engine", {}).get("bytes", {}), run.get("seconds", {})
    return (
        run["run"],
        gate.get("verdict", ""),
        _number("{:.2f}", run.get("perplexity", {}).get("value")),
        increase(gate).replace("%", "") if gate else "",
        _number("{:.3g}", divergence.get("mean_kl")),
        _number("{:.3g}", divergence.get("p99_kl")),
        _number("{:.1f}", divergence.get("top1_percent")),
        *_rouge(run.get("rouge", {}).get("rouge1", {})),
        *_rouge(run.get("rouge", {}).get("rougeL", {})),
        _number("{:.2f}", benchmark.get("time_per_output_token_s"), 1e3),
        _number("{:.0f}", benchmark.get("peak_memory_bytes"), 1e-6),
        _number("{:.1f}", sizes.get("portable"), 1e-6),
        _number("{:.1f}", sizes.get("tensorrt"), 1e-6),
        _number("{:.0f}", seconds.get("quantize")),
        _number("{:.0f}", seconds.get("build")),
    )


def _rouge(score: dict) -> tuple[str, str]:
    """A score, and its difference from the baseline's, article by article."""
    d = score.get("difference")
    return (
        _number("{:.2f}", score.get("mean")),
        f"{d['mean']:+z.2f} [{d['low']:+z.2f}, {d['high']:+z.2f}]" if d else "",
    )


def _number(form: str, value: float | None, factor: float = 1) -> str:
    return "" if value is None else form.format(value * factor)
