"""What a model's recipes will take on which GPU, and what making them takes here, before anything is built."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trtbuild import resources
from trtbuild.checkpoint.sources import dummy_model
from trtbuild.decoder.mapping import Mapping
from trtbuild.decoder.sharding import check_mapping
from trtbuild.engine.build import check_positions
from trtbuild.engine.config import CONFIG_FILE, BuildLimits
from trtbuild.engine.memory import largest_batch, needed
from trtbuild.errors import UserError
from trtbuild.evaluation.floor import context_floor, decode_floor
from trtbuild.evaluation.gpu_table import GPU, GPUS
from trtbuild.files import read_json, user_path
from trtbuild.layout import sizes, split_run
from trtbuild.models.config import ModelConfig
from trtbuild.quantization.declared import declared_network
from trtbuild.quantization.recipe import Recipe, Text
from trtbuild.workflow import (
    LIMITS,
    MODELS_SCHEMA,
    SCHEMAS,
    bytes_of_source,
    calibrations,
    check_limits,
    load_recipes,
    load_table,
    model_config,
    quantizations,
    unknown,
    validate,
)
from trtbuild.yaml_reader import read_yaml

CONFIG = Path("config/config.yaml")
# What the shipped one says, for where there is none.
DEFAULTS: dict = {
    "models": None,
    "recipes": None,
    "matrix": [],
    "build": {
        "engines": ["portable", "tensorrt"],
        "max_batch_size": 8,
        "max_input_len": 1024,
        "max_output_len": 128,
        "extrapolate_positions": False,
    },
    "evaluation": {"device": "auto", "baseline_dtype": "float32", "dataset": {"samples": 16}, "max_output_len": 100},
    "benchmark": {"batch_size": 1, "input_len": 512, "output_len": 64, "repeats": 3},
}
TIMES = ("time_to_first_token_s", "time_per_output_token_s")  # of benchmark.json


@dataclass(frozen=True)
class Model:
    """A declared model: its name, its entry in config/models.yaml, and what it looks like."""

    name: str
    entry: dict
    config: ModelConfig


def declared(name: str, file: Path | None, model_version: str | None = None) -> tuple[Model, dict, dict[str, Recipe]]:
    """A model by its name in config/models.yaml, or its config.json; the configuration in `file`, and its recipes.

    Without a file that is config/config.yaml, or where there is none what the shipped one says. Raises `UserError` for
    a name that is not declared, for a version of one that is, and for a model that does not say what it looks like.
    """
    settings = DEFAULTS
    if file is None and CONFIG.exists():
        file = CONFIG
    if file:
        settings = read_yaml(user_path(file))
        validate(settings, SCHEMAS / "config.schema.yaml", str(file))
        check_limits(settings)
    recipes = load_recipes(settings["recipes"])
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    if path.suffix == ".json":
        source: dict = {"config": str(path)} | ({"model_version": model_version} if model_version else {})
        shape = path.resolve().parent.name if path.stem == "config" else path.stem
        return Model(shape, {"source": {"dummy": source}}, dummy_model(**source)[1].config), settings, recipes
    if settings["models"] is None:
        raise UserError(f"there is no {CONFIG} here, which would say where {name!r} is declared; give a config.json")
    models = load_table(settings["models"], MODELS_SCHEMA)
    if name not in models:
        raise UserError(f"{unknown('model', name, models)}; or give a config.json")
    if model_version:
        raise UserError(f"--model-version is for a config.json; which version {name} is, {settings['models']} says")
    if (config := model_config(name, models[name])) is None:
        raise UserError(
            f"{settings['models']} has no 'config' for {name}; add its published config.json there, or give that file"
        )
    return Model(name, models[name], config), settings, recipes


def runs(
    model: Model, settings: dict, recipes: dict[str, Recipe], names: list[str] | None, layouts: list[str] | None
) -> list[str]:
    """Recipes by name, with each of the layouts where their names have none: the matrix's by default, or all."""
    matrix = [run for entry in settings["matrix"] if entry["model"] == model.name for run in entry["recipes"]]
    asked = names or matrix or list(recipes)
    found = (
        run
        for name in asked
        for run in ([name] if "@" in name or not layouts else [f"{name}@{layout}" for layout in layouts])
    )
    return list(dict.fromkeys(found))


def plan(model: Model, settings: dict, recipes: dict[str, Recipe], runs: Sequence[str], gpus: Sequence[str]) -> dict:
    """The plan of some runs (`int8kv`, `fp16@tp2`) on each of some GPUs, as docs/formats.md describes it.

    `settings` is config/config.yaml. Raises `UserError` for a recipe, layout or GPU that there is not, and where ranks
    can share the model in none of the runs; of several runs those that cannot be say why.
    """
    for name in gpus:
        if name not in GPUS:
            raise UserError(unknown("GPU", name, GPUS))
    for run in runs:
        if (recipe := split_run(run)[0]) not in recipes:
            raise UserError(unknown("recipe", recipe, recipes))
    planned = [plan_of_run(model, settings, recipes[split_run(run)[0]], run, gpus) for run in runs]
    possible = [run["run"] for run in planned if "refused" not in run]
    if not possible:
        raise UserError(planned[0]["refused"])
    return {
        "model": model.name,
        "parameters": model.config.parameters,
        "limits": asdict(_limits(settings)),
        "benchmark": {key: settings["benchmark"][key] for key in ("batch_size", "input_len", "output_len")},
        "runs": planned,
        "stages": stages(model, settings, recipes, possible),
    }


def plan_of_run(model: Model, settings: dict, recipe: Recipe, run: str, gpus: Sequence[str]) -> dict:
    """Bytes of each rank, what that is on each GPU, and beside it what was measured, if anything was."""
    mapping, limits = _mapping(model, run), _limits(settings)
    try:
        check_mapping(model.config, mapping, recipe.group_size)
        if not settings["build"]["extrapolate_positions"]:
            check_positions(model.config, limits)
        # Ranks of a stage have as much of everything.
        first = mapping.ranks[:: mapping.tp_size]
        networks = [declared_network(model.config, recipe, rank, limits.max_length) for rank in first]
    except UserError as error:
        return {"run": run, "refused": str(error)}
    memory = [needed(network, limits) for network in networks]
    benchmark = {key: settings["benchmark"][key] for key in ("batch_size", "input_len", "output_len")}

    def on(gpu: GPU) -> dict:
        batch = min(largest_batch(network, limits, gpu.free) for network in networks)
        lengths = limits.max_input_len, limits.max_output_len
        step = decode_floor(networks, mapping, gpu, batch, *lengths) if batch else None
        return {
            "free_bytes": gpu.free,
            "fits": all(rank.total <= gpu.free for rank in memory),
            "largest_batch": batch,
            "largest_batch_tokens_per_s": step and batch / step,
            "time_to_first_token_s": context_floor(networks, gpu, benchmark["batch_size"], benchmark["input_len"]),
            "time_per_output_token_s": decode_floor(networks, mapping, gpu, **benchmark),
        }

    ranks = [asdict(memory[rank.pp_rank]) for rank in mapping.ranks]
    planned = {"run": run, "ranks": ranks, "gpus": {name: on(GPUS[name]) for name in gpus}}
    measured = _measured(Path("results", model.name, run))
    return planned | ({"measured": measured} if measured else {})


def stages(model: Model, settings: dict, recipes: dict[str, Recipe], runs: Sequence[str]) -> list[dict]:
    """By rule, what all jobs ask for that make the runs' scores, speed and tables from nothing.

    `jobs`, `mem_mb` of the largest and `disk_mb` of all together: what rules/ asks for with the same functions.
    """
    config, limits, device = model.config, _limits(settings), resources.device_of(settings)
    used = {recipe: recipes[recipe] for recipe in dict.fromkeys(split_run(run)[0] for run in runs)}
    text, steps = resources.text_of(settings), resources.summary_steps(settings)
    tasks = settings.get("lm_eval", {}).get("tasks", ())
    found: dict[str, list[resources.Needs]] = {
        "checkpoint": [resources.checkpoint(config, bytes_of_source(model.entry["source"]))],
        "calibration": [
            resources.calibration(config, Text(**calibration["settings"]), device)
            for calibration in calibrations(used).values()
        ],
        "quantize": [
            resources.quantization(config, quantization.get("quantization"), device)
            for quantization in quantizations(used).values()
        ],
    }

    def add(rule: str, needs: resources.Needs) -> None:
        found.setdefault(rule, []).append(needs)

    short = resources.Needs()
    for run in runs:
        recipe, first = recipes[split_run(run)[0]], _mapping(model, run)
        for mapping in first.ranks:
            engine = config, recipe, mapping, limits
            for kind in settings["build"]["engines"]:
                build = resources.portable_engine if kind == "portable" else resources.tensorrt_engine
                add(f"{kind}_engine", build(*engine))
        whole = config, recipe, first, limits
        add("engine", resources.engine_config(*whole))
        add("perplexity", resources.run(*whole, text, 0, device))
        add("gate", short)
        add("summarize", resources.run(*whole, text, steps, device))
        add("rouge", short)
        for _ in tasks:
            add("lm_eval", resources.run(*whole, *resources.task_work(settings), device))
        add("benchmark", resources.run(*whole, *resources.benchmark_work(settings), device))
    baseline = config, settings["evaluation"]["baseline_dtype"], limits
    add("perplexity_hf", resources.baseline(*baseline, text, 0, device))
    add("summarize_hf", resources.baseline(*baseline, text, steps, device))
    for _ in tasks:
        add("lm_eval_hf", resources.baseline(*baseline, *resources.task_work(settings), device))
    add("rouge", short)
    for rule in ("recipes", "table", "page"):
        add(rule, short)
    asked = {rule: [needs.resources(1) for needs in all_needs] for rule, all_needs in found.items() if all_needs}
    return [
        {
            "rule": rule,
            "jobs": len(jobs),
            "mem_mb": max(job["mem_mb"] for job in jobs),
            "disk_mb": sum(job["disk_mb"] for job in jobs),
        }
        for rule, jobs in asked.items()
    ]


def table(planned: dict) -> str:
    """A plan to read: GB of the largest rank, floors in ms."""
    limits, benchmark = planned["limits"], planned["benchmark"]
    lines = [
        f"{planned['model']}, {planned['parameters'] / 1e9:.2f} billion parameters; engines for "
        f"{limits['max_batch_size']} x {limits['max_input_len']} tokens in, {limits['max_output_len']} out",
        "GB of the largest rank. At the GPU's published bandwidth and rates no less than: ms to the first token and a",
        f"token, {benchmark['batch_size']} x {benchmark['input_len']} in, {benchmark['output_len']} out; no more than: "
        "tokens a second with the largest batch.",
        "",
    ]
    heads = ("weights", "cache", "step", "sum", "free", "fits", "batch", "first", "token", "tokens/s")
    rows: list[tuple[str, ...]] = [("run", "GPUs", *heads)]
    for run in planned["runs"]:
        if "refused" in run:
            continue
        count = f"{len(run['ranks'])} x " if len(run["ranks"]) > 1 else ""
        largest = max(run["ranks"], key=lambda rank: sum(rank.values()))
        memory = *map(_gb, largest.values()), _gb(sum(largest.values()))
        rows += [(run["run"], count + name, *memory, *_on_gpu(on)) for name, on in run["gpus"].items()]
        if not run["gpus"]:
            rows.append((run["run"], "", *memory))
        if measured := run.get("measured"):
            rows.append(_measured_row(measured))
    lines += _aligned(rows, 2)
    lines += [f"{run['run']}: {run['refused']}" for run in planned["runs"] if "refused" in run]
    rows = [("rule", "jobs", "GB of memory", "GB of disk")]
    for stage in planned["stages"]:
        disk = f"{stage['disk_mb'] / 1e3:.1f}" if stage["disk_mb"] else ""
        rows.append((stage["rule"], str(stage["jobs"]), f"{stage['mem_mb'] / 1e3:.1f}", disk))
    jobs, disk_mb = (sum(stage[key] for stage in planned["stages"]) for key in ("jobs", "disk_mb"))
    rows.append(("all", str(jobs), "", f"{disk_mb / 1e3:.1f}"))
    return "\n".join([*lines, "", "Memory of a rule's largest job, disk of all its jobs:", "", *_aligned(rows, 1)])


def _on_gpu(on: dict) -> tuple[str, ...]:
    rate = on["largest_batch_tokens_per_s"]
    times = (f"{1e3 * on[key]:.2f}" for key in TIMES)
    batch = str(on["largest_batch"])
    return _gb(on["free_bytes"]), "yes" if on["fits"] else "no", batch, *times, f"{rate:.0f}" if rate else ""


def _measured_row(measured: dict) -> tuple[str, ...]:
    portable = [size for name, size in measured.get("engine_bytes", {}).items() if name.endswith(".safetensors")]
    peak = measured.get("peak_memory_bytes")
    times = (f"{1e3 * measured[key]:.2f}" if key in measured else "" for key in TIMES)
    where = f"measured: {measured.get('device', 'not yet')}"
    return "", where, _gb(max(portable)) if portable else "", "", "", _gb(peak) if peak else "", "", "", "", *times


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f}"


def _aligned(rows: list[tuple[str, ...]], names: int) -> list[str]:
    """Columns as wide as they need to be, the first `names` of them on the left."""
    widths = [max(len(row[i]) for row in rows if len(row) > i) for i in range(max(map(len, rows)))]
    return [
        "  ".join(
            cell.ljust(width) if i < names else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    ]


def _mapping(model: Model, run: str) -> Mapping:
    """Of the first rank."""
    layout: dict = sizes(split_run(run)[1], model.entry)
    return Mapping(**layout)


def _limits(settings: dict) -> BuildLimits:
    return BuildLimits(**{key: settings["build"][key] for key in LIMITS})


def _measured(folder: Path) -> dict:
    """What a run's benchmark and its engine say, as far as they are there: device, bytes, seconds."""
    found: dict = {}
    if (file := folder / "engine" / CONFIG_FILE).exists():
        outputs = read_json(file, {"outputs": dict})["outputs"]
        found["engine_bytes"] = {name: output["bytes"] for name, output in outputs.items()}
    if (file := folder / "benchmark.json").exists():
        result = read_json(file, {"peak_memory_bytes": int, "provenance": dict})
        found |= {
            key: result[key]
            for key in ("batch_size", "input_len", "output_len", "peak_memory_bytes", *TIMES)
            if key in result
        }
        found["device"] = result["provenance"].get("device", "")
    return found
