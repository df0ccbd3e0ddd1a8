"""A model's recipes as one self-contained HTML page, made of `recipes.json` alone."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from trtbuild.evaluation import plots
from trtbuild.evaluation.gate import increase, verdict
from trtbuild.evaluation.plots import Point
from trtbuild.evaluation.table import baseline_name

TEMPLATE = "page.html.jinja"
# Of a prediction and what was measured: where that is, and both as they are plotted.
PREDICTED = {
    "weight_bytes": ("engine.weight_bytes", 1e-6, "MB of weights"),
    "peak_memory_bytes": ("benchmark.peak_memory_bytes", 1e-6, "MB at the peak"),
    "floor_per_output_token_s": ("benchmark.floor_per_output_token_s", 1e3, "ms a token, at least"),
}


class Column(NamedTuple):
    """Of the table: where its number is in a run (`path`, keys with dots), and how it is shown."""

    title: str
    path: str
    form: str = "{:.2f}"
    factor: float = 1
    group: str = "quality"
    more: bool = False  # the more the better
    note: str = ""


COLUMNS = (
    Column("perplexity increase %", "gate.increase_percent", "{:+z.2f}", note="over the baseline's, by article"),
    Column("perplexity", "perplexity.value"),
    Column("mean KL", "divergence.mean_kl", "{:.4f}", note="of next-token distributions from the baseline's, nats"),
    Column("same token %", "divergence.top1_percent", "{:.1f}", more=True, note="both find the same one most likely"),
    Column("ms a token", "benchmark.time_per_output_token_s", "{:.4g}", 1e3, "speed"),
    Column("times floor", "benchmark.times_floor", group="speed", note="the time that a step's bytes take to read"),
    Column("ms to first", "benchmark.time_to_first_token_s", "{:.4g}", 1e3, "speed", note="token, of the prompt"),
    Column("tokens/s", "benchmark.output_tokens_per_s", "{:.4g}", 1, "speed", True),
    Column("peak MB", "benchmark.peak_memory_bytes", "{:.0f}", 1e-6, "memory", note="of a rank"),
    Column("portable MB", "engine.bytes.portable", "{:.1f}", 1e-6, "memory", note="engine files of all ranks"),
    Column("TensorRT MB", "engine.bytes.tensorrt", "{:.1f}", 1e-6, "memory", note="engine files of all ranks"),
    Column("ROUGE-1", "rouge.rouge1.mean", group="summaries", more=True),
    Column(
        "difference", "rouge.rouge1.difference.mean", "{:+z.2f}", 1, "summaries", True, "ROUGE-1 less the baseline's"
    ),
    Column("ROUGE-L", "rouge.rougeL.mean", group="summaries", more=True),
    Column(
        "difference", "rouge.rougeL.difference.mean", "{:+z.2f}", 1, "summaries", True, "ROUGE-L less the baseline's"
    ),
)
# Of the recommended recipe and the baseline, at the top.
SHORT = ("perplexity.value", "rouge.rouge1.mean", "benchmark.time_per_output_token_s", "benchmark.peak_memory_bytes")


def page(data: dict) -> str:
    """The page of a `recipes.json`. Texts of models and articles are escaped; nothing is fetched when it is opened."""
    from jinja2 import Environment, FileSystemLoader  # an extra, and rules alone make pages

    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "cell": cell}
    runs = data["runs"]
    tasks = dict.fromkeys(task for run in (data["baseline"], *runs) for task in run.get("lm_eval", {}))
    columns = [
        column for column in (*COLUMNS, *map(_task, tasks)) if any(get(r, column.path) is not None for r in runs)
    ]
    return environment.get_template(TEMPLATE).render(
        data=data,
        baseline=data["baseline"] | {"name": baseline_name(data["baseline"])},
        columns=columns,
        short=[column for column in columns if column.path in SHORT],
        device=next((origin["device"] for run in runs if (origin := get(run, "provenance.benchmark"))), None),
        kinds={run["run"]: kind(data, run) for run in runs},
        rejected=[run for run in runs if above_limit(run)],
        verdict=verdict,
        tradeoffs=_tradeoffs(data),
        predicted=_predicted(runs),
        expected=PREDICTED,
        layers={run["run"]: _layers(data, run) for run in runs},
        parts={run["run"]: _shares(run) for run in runs},
    )


def get(run: dict, path: str) -> Any:
    """What is at keys joined by dots, or None."""
    value: Any = run
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def above_limit(run: dict) -> bool:
    """Whether its gate's limit is exceeded; what it stops then depends on the recipe."""
    return get(run, "gate.above_limit") is True


def kind(data: dict, run: dict) -> str:
    """How a run is marked, in one word."""
    if data["recommended"] and data["recommended"]["run"] == run["run"]:
        return "recommended"
    return "above" if above_limit(run) else "front" if run["run"] in data["front"] else "other"


def number(value: float | None, form: str = "{:.4g}", factor: float = 1) -> str:
    """A number as it is shown; nothing where there is none."""
    return "" if value is None else form.format(value * factor).replace("-", "−")


def cell(run: dict, column: Column) -> dict:
    """A number of the table with its 95% interval."""
    where = column.path.rpartition(".")[0]
    low, high = (get(run, f"{where}.{end}") for end in ("low", "high"))
    known = low is not None and high is not None and column.path.endswith((".mean", ".value", ".increase_percent"))
    ends = [number(end, column.form, column.factor) for end in (low, high)] if known else []
    value = get(run, column.path)
    return {"value": value, "text": number(value, column.form, column.factor), "interval": "\u2009…\u2009".join(ends)}


def _task(task: str) -> Column:
    return Column(task, f"lm_eval.{task}.value", "{:.3f}", 1, "tasks", True, "of lm-evaluation-harness")


def _tradeoffs(data: dict) -> list[str]:
    """Quality by time and by memory."""
    axes = (
        ("benchmark.time_per_output_token_s", 1e3, "ms a token"),
        ("benchmark.peak_memory_bytes", 1e-6, "MB of memory"),
    )
    plotted = []
    for path, factor, label in axes:
        points = [
            Point(
                run["run"],
                get(run, path) * factor,
                run["gate"]["increase_percent"],
                run["gate"].get("low"),
                run["gate"].get("high"),
                kind(data, run),
                f"{run['run']}: {increase(run['gate'])} perplexity, {get(run, path) * factor:.4g} {label}",
            )
            for run in data["runs"]
            if get(run, path) is not None and "gate" in run
        ]
        if points:
            plotted.append(plots.scatter(points, data["front"], label, "perplexity, % above the baseline"))
    return plotted


def _predicted(runs: list[dict]) -> list[str]:
    """Measured by predicted numbers, a plot for each of them."""
    plotted = []
    for name, (path, factor, label) in PREDICTED.items():
        both = [(run["run"], get(run, f"predicted.{name}"), get(run, path)) for run in runs]
        points = [
            Point(
                run,
                a * factor,
                b * factor,
                None,
                None,
                "other",
                f"{run}: {a * factor:.6g} and {b * factor:.6g} {label}",
            )
            for run, a, b in both
            if a and b
        ]
        if points:
            plotted.append(plots.diagonal(points, f"predicted {label}", "measured"))
    return plotted


def _layers(data: dict, run: dict) -> list[tuple[str, str, str]]:
    """Title, remark and plot of what is known of a run's layers."""
    found = []
    if zeroed := get(run, "layers.zeroed_percent"):
        found.append(
            (
                "Activations rounded to zero",
                f"Channels that are below half a step of the tensor's one scale. {_worst(zeroed, '%')}",
                plots.lines(_named(zeroed), "% of channels"),
            )
        )
    if errors := get(run, "layers.relative_errors"):
        percent = {name: [None if x is None else 100 * x for x in values] for name, values in errors.items()}
        remark = "What rounding changes in a weight, of its norm; GPTQ and AWQ err less in what products give. "
        plot = plots.lines(_named(percent), "% of the weight's norm")
        found.append(("Error of the weights", remark + _worst(percent, "%"), plot))
    if ranges := data["calibrations"].get(run.get("calibration"), {}).get("ranges"):
        outliers = {
            name: [a / b if b else None for a, b in zip(of["max"], of["median"], strict=True)]
            for name, of in ranges.items()
        }
        remark = "A channel's range, the largest over the median one, before smoothing. "
        plot = plots.lines(_named(outliers), "times the median channel", log=True)
        found.append(("Outliers", remark + _worst(outliers, " times"), plot))
        largest = {name: of["max"] for name, of in ranges.items()}
        plot = plots.lines(_named(largest), "largest magnitude", log=True)
        found.append(("Ranges", f"Of products' inputs, keys and values, as calibrated. {_worst(largest, '')}", plot))
    return found


def _named(series: dict[str, list]) -> dict[str, list]:
    """By names as short as they can be."""
    return {name.rpartition(".")[2].removesuffix("_proj"): values for name, values in series.items()}


def _worst(series: Mapping[str, Iterable], unit: str) -> str:
    values = [(x, layer, name) for name, of in series.items() for layer, x in enumerate(of) if x is not None]
    if not values:
        return ""
    x, layer, name = max(values)
    return f"Most in layer {layer}, {name.rpartition('.')[2]}: {x:.3g}{unit}."


def _shares(run: dict) -> list[tuple[str, int, float]]:
    """Parts of an engine: name, bytes, per cent; the largest first."""
    parts = get(run, "engine.parts") or {}
    total = sum(parts.values())
    return [(name, size, 100 * size / total) for name, size in sorted(parts.items(), key=lambda part: -part[1])]
