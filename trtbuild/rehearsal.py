"""A rehearsal: the whole chain with a model's real shapes, and with dummy weights, two layers and hardly any text.

Its model is named `rehearsal/NAME` and lies beside the real one: `results/rehearsal/NAME/...` is a target as any other.
How much is done follows from that name, which is part of every path and of every result's provenance; what is marked as
a rehearsal is so by the name alone (`engine.config.marker`).
"""

import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.engine.config import REHEARSAL
from trtbuild.errors import UserError
from trtbuild.files import read_json, scratch_beside, user_path
from trtbuild.layout import sizes
from trtbuild.quantization.recipe import Recipe

if TYPE_CHECKING:
    from trtbuild.checkpoint.canonical import Checkpoint

# How much work a rehearsal does; less where the configuration asks for less. The build limits, the data sets and the
# prompt stay as they are configured: the engines are those that will be built, but for their number of layers.
LAYERS = 2
DTYPE = "float16"  # of the dummy weights, half of what float32 would take
ARTICLES, CHARACTERS = 2, 64
MAX_OUTPUT_LEN = 8
BASELINE_DTYPE = "bfloat16"  # also where float32 is configured, which takes twice the memory
CALIBRATION = {"samples": 2, "length": 64}
BENCHMARK = {"batch_size": 1, "input_len": 64, "output_len": 4, "repeats": 1}
# What it takes: seconds a job, and GB a second that are made, hashed and written (Qwen-7B's 11 jobs on two cores).
JOB_SECONDS, WRITTEN = 8, 0.13
ENGINE = "engine/config.json"
# For a model that declares none, in place of the one that its published tokenizer may bring along.
CHAT_TEMPLATE = "plain"


def rehearsal_target(target: str) -> str:
    """The file that a rehearsal makes instead of `target`; a rule's name stays what it is."""
    path = os.path.normpath(target)
    is_result = path.startswith("results/") and not path.startswith(f"results/{REHEARSAL}")
    return path.replace("results/", f"results/{REHEARSAL}", 1) if is_result else target


def rehearsal_config(config: dict) -> dict:
    """`config/config.yaml` as it holds for rehearsals: with their models' names and amounts of work."""
    evaluation, benchmark = config["evaluation"], config["benchmark"]
    dataset, tasks = evaluation["dataset"], config.get("lm_eval", {})
    return config | {
        "matrix": [entry | {"model": REHEARSAL + entry["model"]} for entry in config["matrix"]],
        "evaluation": evaluation
        | {
            "dataset": dataset | {"samples": min(ARTICLES, dataset["samples"]), "characters": CHARACTERS},
            "baseline_dtype": BASELINE_DTYPE,
            "max_output_len": min(MAX_OUTPUT_LEN, evaluation["max_output_len"]),
        },
        "benchmark": {key: min(value, benchmark[key]) for key, value in BENCHMARK.items()},
        "lm_eval": tasks | {"limit": min(ARTICLES, tasks.get("limit", ARTICLES))},
    }


def rehearsal_models(models: dict) -> dict:
    """`config/models.yaml` with dummy weights, of the models that say what they look like (`shape_of`)."""
    found = {}
    for name, model in models.items():
        if shape_of(model):
            dummy = dummy_source(model) | {"num_layers": rehearsal_layers(model), "dtype": DTYPE}
            found[REHEARSAL + name] = {"chat_template": CHAT_TEMPLATE} | model | {"source": {"dummy": dummy}}
    return found


def rehearsal_layers(model: dict) -> int:
    """How many layers a declared model's rehearsal has: at least one for each stage of its own layout."""
    return max(LAYERS, sizes("", model)["pp_size"])


def shape_of(model: dict) -> str | dict | None:
    """The published config.json of a declared model, its path or content: declared, or in the model's own folder."""
    ((kind, source),) = model["source"].items()
    own = user_path(source["path"]) / "config.json" if kind == "local" else None
    return model.get("config") or source.get("config") or (str(own) if own and own.is_file() else None)


def dummy_source(model: dict) -> dict:
    """Where a declared model's dummy weights come from, if it says what it looks like (`shape_of`)."""
    ((_, source),) = model["source"].items()
    return {"config": shape_of(model)} | {key: source[key] for key in ("model_version",) if key in source}


def rehearsal_recipes(recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """The recipes without published weights, with a gate that never stops: random weights are no measure."""
    kept = {name: small_calibration(recipe) for name, recipe in recipes.items() if not recipe.quant_checkpoint}
    return {name: Recipe.parse(recipe.settings | {"gate": "warn"}) for name, recipe in kept.items()}


def small_calibration(recipe: Recipe) -> Recipe:
    """A recipe that is calibrated with hardly any text, if it is calibrated at all."""
    if not (recipe.kv_cache or (recipe.quantization and recipe.quantization.text)):
        return recipe
    amounts = {key: min(value, getattr(recipe.text, key)) for key, value in CALIBRATION.items()}
    return Recipe.parse(recipe.settings | {"calibration": recipe.settings.get("calibration", {}) | amounts})


def cost(jobs: list) -> str:
    """What the jobs of rehearsals take, on one machine: by what they write, and a start of Python and torch each."""
    written = sum(job.resources.get("disk_mb", 0) for job in jobs) / 1e3
    minutes = math.ceil((JOB_SECONDS * len(jobs) + written / WRITTEN) / 60)
    return f"about {minutes} min on two idle cores, up to {math.ceil(written)} GB of disk"


def verdicts(targets: Iterable[str]) -> list[str]:
    """What was built, what was checked and what was not, of each run of `targets` whose engine is there."""
    matches = [re.match(rf"results/({REHEARSAL}[^/]+)/([^/]+)/", os.path.normpath(target)) for target in targets]
    runs = dict.fromkeys(match.groups() for match in matches if match)
    return [_verdict(model, run) for model, run in runs if Path("results", model, run, ENGINE).exists()]


def _verdict(model: str, run: str) -> str:
    folder, name = Path("results", model, run), model.removeprefix(REHEARSAL)
    engine = read_json(folder / ENGINE)
    sizes = [f"{name} ({file['bytes'] / 1e9:.1f} GB)" for name, file in engine["outputs"].items()]
    limits = " + ".join(str(engine["limits"][key]) for key in ("max_input_len", "max_output_len"))
    lines = [
        f"Rehearsed {name}/{run} with random weights:",
        f"built        {', '.join(sizes)}",
        f"             {engine['model_config']['num_hidden_layers']} layers of real shapes, for {limits} tokens and "
        f"batches of {engine['limits']['max_batch_size']}",
    ]
    unused = {"portable", *engine["builders"]}
    if (folder / "perplexity.json").exists():
        result = read_json(folder / "perplexity.json")
        origin, found = result["provenance"], result["divergence"]
        unused.discard(origin["engine"])
        lines += [
            f"checked      the {origin['engine']} engine, on {origin['device']}, beside {found['baseline']['engine']}:",
            f"             KL divergence {found['mean_kl']:.2g} nats, the same most likely token for "
            f"{found['top1_percent']:.0f}% of {result['tokens']}",
        ]
    lines.append(
        "not checked  real weights, tokenizer and chat template; quality; long prompts; speed and memory of all layers"
    )
    lines += [f"             the {kind} engine, which was built and not run" for kind in sorted(unused)]
    lines.append(f"The real one: snakemake results/{name}/{run}/rouge.json. results/{model} can be removed.")
    return "\n".join(lines)


@contextmanager
def dummy_weights(dummy: dict, recipe: Recipe, engine_dir: Path) -> Iterator[tuple["Path | Checkpoint", Path | None]]:
    """Yields what `engine_dir` is built from by a recipe: random weights, and their calibration if needed.

    `dummy` is their source. Where the recipe quantizes they lie, quantized, in a temporary folder beside `engine_dir`;
    otherwise nowhere. Raises `UserError` for a recipe that takes published weights.
    """
    if recipe.quant_checkpoint:
        raise UserError("a recipe that takes published weights (quant_checkpoint) has no dummy; build it from those")
    from trtbuild.checkpoint.sources import dummy_model, make_checkpoint
    from trtbuild.quantization.calibration import calibrate
    from trtbuild.quantization.quantize import quantize

    quantization = recipe.quantization
    if not quantization and not recipe.kv_cache:
        yield dummy_model(**dummy)[1], None
        return
    with scratch_beside(engine_dir) as folder:
        weights, calibration = folder / "checkpoint", None
        make_checkpoint({"dummy": dummy}, weights)
        if recipe.needs_ranges:
            calibration = folder / "calibration.npz"
            calibrate(weights, calibration, **recipe.text.settings)
        if quantization:
            quantize(weights, folder / "quantized", quantization, calibration if quantization.needs_ranges else None)
            weights = folder / "quantized"
        yield weights, calibration
