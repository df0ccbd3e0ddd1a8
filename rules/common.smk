# The configuration, validated, and what rules share.

import errno
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from trtbuild import gpus, rehearsal
from trtbuild import resources as needs_of
from trtbuild import workflow as trtbuild_workflow
from trtbuild.checkpoint.source_files import source_state
from trtbuild.datasets import articles_state
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits, marker, rank_file
from trtbuild.errors import UserError
from trtbuild.folder_lock import one_controller
from trtbuild.kept_outputs import keep_outputs
from trtbuild.layout import LAYOUT, sizes, split_run
from trtbuild.quantization.recipe import Text
from trtbuild.yaml_reader import read_yaml

trtbuild_workflow.export_package(workflow.basedir)
one_controller()
keep_outputs({"checkpoint", "calibration", "quantize"})
trtbuild_workflow.say_costs()

SCHEMAS = trtbuild_workflow.SCHEMAS

try:
    for file in workflow.configfiles:  # Snakemake takes the last of equal keys
        read_yaml(file)
    REHEARSE = trtbuild_workflow.rehearses(config)
    trtbuild_workflow.validate(config, SCHEMAS / "config.schema.yaml", "config/config.yaml")
    trtbuild_workflow.check_limits(config)
    MODELS = trtbuild_workflow.load_table(config["models"], SCHEMAS / "models.schema.yaml")
    RECIPES = trtbuild_workflow.load_recipes(config["recipes"])
    trtbuild_workflow.check_articles(config, RECIPES)
    TARGETS = trtbuild_workflow.matrix_targets(config)
    if REHEARSE:
        TARGETS = list(map(rehearsal.rehearsal_target, TARGETS))
    # Targets are only known from the command line here; a wrong name would else end as "missing input files".
    trtbuild_workflow.check_targets([*sys.argv[1:], *TARGETS], MODELS, RECIPES, REHEARSE)
    trtbuild_workflow.check_layouts_of_targets([*sys.argv[1:], *TARGETS], MODELS, RECIPES)
    trtbuild_workflow.check_positions_of_targets([*sys.argv[1:], *TARGETS], MODELS, RECIPES, config["build"])
    trtbuild_workflow.check_fp8_of_targets(sys.argv[1:], config, RECIPES)
    trtbuild_workflow.check_rehearsal(sys.argv[1:], config, MODELS, RECIPES)
    DECLARED = MODELS
    MODELS = MODELS | rehearsal.rehearsal_models(MODELS)
    CHAT_TEMPLATES = trtbuild_workflow.chat_templates(MODELS, config["models"])
except UserError as error:
    raise WorkflowError(str(error)) from None

# Rehearsals are models as others; little is done with them.
REHEARSED_CONFIG = rehearsal.rehearsal_config(config)
REHEARSED_RECIPES = rehearsal.rehearsal_recipes(RECIPES)
QUANTIZATIONS = trtbuild_workflow.quantizations(RECIPES) | trtbuild_workflow.quantizations(REHEARSED_RECIPES)
CALIBRATIONS = trtbuild_workflow.calibrations(RECIPES) | trtbuild_workflow.calibrations(REHEARSED_RECIPES)

# A profile for a cluster says which rules run where snakemake does; without one all do, and share this machine.
CLUSTER = "local_rules" in config
# Cores for a process that computes: a cluster's nodes have some for each of their GPUs. None is this machine's number.
THREADS = 8 if CLUSTER else 16
if not CLUSTER and workflow.is_main_process and "gpu" not in workflow.global_resources:
    # At least 1, also where there is none: rules that run a model never run side by side on one GPU, or on a CPU.
    workflow.register_resource("gpu", max(1, len(gpus.visible())))


wildcard_constraints:
    model="|".join(map(re.escape, MODELS)) or "none",
    recipe="|".join(map(re.escape, RECIPES)) or "none",
    layout=f"(?:{LAYOUT})?",
    run="|".join([*(f"{re.escape(recipe)}(?:{LAYOUT})?" for recipe in RECIPES), "hf"]),
    rank=r"0|[1-9]\d*",
    task=r"[^/]+",
    quantization="|".join(map(re.escape, QUANTIZATIONS)) or "none",
    calibration="|".join(map(re.escape, CALIBRATIONS)) or "none",


def config_of(wildcards):
    """The configuration as it holds for a model."""
    return REHEARSED_CONFIG if marker(wildcards.model) else config


def recipes_of(wildcards):
    """The recipes as they hold for a model."""
    return REHEARSED_RECIPES if marker(wildcards.model) else RECIPES


def recipe_of(wildcards):
    return recipes_of(wildcards)[wildcards.recipe]


def text_of_calibration(wildcards):
    return Text(**CALIBRATIONS[wildcards.calibration]["settings"])


def layout_of(wildcards):
    """How ranks share a run's model: `Mapping`, but for the rank."""
    return sizes(wildcards.layout, MODELS[wildcards.model])


def number_of_ranks(layout):
    return layout["tp_size"] * layout["pp_size"]


def ranks_of(wildcards):
    """How many processes run an engine, and on as many GPUs."""
    return number_of_ranks(layout_of(wildcards))


def threads_of(wildcards):
    """Cores of all processes that run an engine."""
    return THREADS * ranks_of(wildcards)


def threads_of_rank(wildcards, threads):
    """Cores of each. (A job on several nodes sees the cores of its first one alone, so it may use fewer than it has.)"""
    return max(1, threads // ranks_of(wildcards))


def launcher_of(wildcards):
    """What starts an engine's ranks (profiles/slurm has another); nothing where there is one."""
    return config.get("mpi", "mpiexec") if ranks_of(wildcards) > 1 else ""


def ranks_of_model(wildcards):
    """GPUs of the baseline, which is spread over those that the model is declared for."""
    return number_of_ranks(sizes("", MODELS[wildcards.model]))


def default_targets(wildcards):
    """What `snakemake` alone makes; said only here, where it is asked for: what of it cannot be built or rehearsed."""
    try:
        trtbuild_workflow.check_fp8_of_targets(TARGETS, config, RECIPES)
        trtbuild_workflow.check_rehearsal(TARGETS, config, DECLARED, RECIPES)
    except UserError as error:
        raise WorkflowError(str(error)) from None
    return TARGETS


def build_limits():
    return {key: config["build"][key] for key in trtbuild_workflow.LIMITS}


def tensorrt_options(kinds=("tensorrt",)):
    """How the network is lowered, and for which GPUs: the latter matters only to a TensorRT engine."""
    options = {"remove_input_padding": config["build"]["remove_input_padding"]}
    if "tensorrt" in kinds and config["build"]["compute_capabilities"] != "auto":
        options["compute_capabilities"] = config["build"]["compute_capabilities"]
    return options


def engine_folder(wildcards):
    return f"results/{wildcards.model}/{wildcards.recipe}{wildcards.layout}/engine"


def kinds_of_engine(wildcards):
    """The kinds of engine that are asked for, or are there and up to date."""
    return trtbuild_workflow.kinds_of_engine(
        Path(engine_folder(wildcards)),
        config["build"],
        recipe=recipe_of(wildcards).engine_settings,
        limits=build_limits(),
        mapping=Mapping(**layout_of(wildcards)).layout,
    )


def engine_files(wildcards):
    """Every rank's file of these."""
    kinds, ranks = kinds_of_engine(wildcards), range(ranks_of(wildcards))
    return [f"{engine_folder(wildcards)}/{rank_file(rank, kind)}" for rank in ranks for kind in kinds]


def weights_of_recipe(wildcards):
    return f"results/{wildcards.model}/{trtbuild_workflow.weights_folder(recipe_of(wildcards))}"


def ranges_of_cache(wildcards):
    """The calibration file of a recipe with a quantized KV cache."""
    recipe = recipe_of(wildcards)
    name = trtbuild_workflow.calibration_name(recipe)
    return f"results/{wildcards.model}/calibration/{name}.npz" if recipe.kv_cache else []


def ranges_of_quantization(wildcards):
    """The calibration file of quantized activations."""
    quantization = QUANTIZATIONS[wildcards.quantization].get("quantization")
    if not (quantization and quantization.needs_ranges):
        return []
    return f"results/{wildcards.model}/calibration/{quantization.text.id}.npz"


def settings_of_quantization(wildcards):
    """How weights are quantized, as plain data; None where they are published."""
    quantization = QUANTIZATIONS[wildcards.quantization].get("quantization")
    return quantization and quantization.settings


def state_of_quantization(wildcards):
    """The state of the files that weights are quantized with (articles), or that they are (published weights)."""
    wanted = QUANTIZATIONS[wildcards.quantization]
    if "source" in wanted:
        return source_state(wanted["source"])
    text = wanted["quantization"].text
    return text and articles_state(**text.dataset)


def gate_of_run(wildcards):
    """What stands between an engine and its scores; the baseline has no gate."""
    return f"results/{wildcards.model}/{wildcards.run}/gate.json" if wildcards.run != "hf" else []


def shown(path, result):
    """An output of `results/{model}/` that `snakemake --report` shows, with a text of report/ beside it."""
    _, model, *run, name = path.split("/")
    kind = run[1] if run[1:] else Path(name).stem
    return report(
        path,
        caption=f"../report/{kind}.rst",
        category=model,
        subcategory="".join(run[:1]) or "All recipes",
        labels={"result": result},
    )


def runs_of_table(wildcards):
    """A model's baseline and runs that have results or are in the matrix, with the names of these results."""
    recipes = recipes_of(wildcards)
    return trtbuild_workflow.runs_of_table(wildcards.model, config_of(wildcards), recipes, sys.argv[1:])


def runs_made_of(wildcards):
    """Of these, but the baseline, what their engines are made of."""
    recipes = {run: recipes_of(wildcards)[split_run(run)[0]] for run in runs_of_table(wildcards) if run != "hf"}
    return {run: trtbuild_workflow.made_of(recipe) for run, recipe in recipes.items()}


def evaluation(*keys, **options):
    """What of the configuration's `evaluation` a rule depends on, as it holds for a model; and other options."""
    return lambda wildcards: {key: config_of(wildcards)["evaluation"][key] for key in keys} | options


def chat_template(wildcards):
    """The text of the template that a model is talked to with; None: its tokenizer's own, or there is no chat."""
    if not config["evaluation"]["chat"]:
        return None
    try:
        trtbuild_workflow.check_chat_template(wildcards.model, MODELS[wildcards.model], config["models"])
    except UserError as error:
        raise WorkflowError(str(error)) from None
    return CHAT_TEMPLATES[wildcards.model]


def task_options(*keys, **options):
    """The same of an accuracy task."""
    evaluated = evaluation(*keys, **options)
    return lambda wildcards: evaluated(wildcards) | trtbuild_workflow.task_options(config_of(wildcards))


def articles_to_evaluate(wildcards):
    return articles_state(**config_of(wildcards)["evaluation"]["dataset"])


def baseline_limits():
    """The Hugging Face model sees as much of an article as the engines do."""
    return {"max_input_len": config["build"]["max_input_len"]}


def baseline_lengths():
    """And as long texts, where it has tasks."""
    return {key: config["build"][key] for key in ("max_input_len", "max_output_len")}


# What rules ask of a machine (trtbuild/resources.py). It is no parameter: nothing is made again because of it.

DEVICE = needs_of.device_of(config)


def needs(of):
    """The resources `mem_mb`, `runtime` and `disk_mb`, from a function of the model's configuration and the wildcards.

    Before a model's checkpoint is made, and where config/models.yaml has no `config` of it, they are to be determined.
    """

    def resource(name):
        def value(wildcards, input, attempt):
            model = trtbuild_workflow.model_config(wildcards.model, MODELS[wildcards.model])
            if model is None and (missing := [file for file in input if not Path(file).exists()]):
                raise FileNotFoundError(errno.ENOENT, "the model's sizes are not known yet", missing[0])
            known = model or not input  # of the rule that makes the checkpoint itself
            return (of(model, wildcards) if known else needs_of.UNKNOWN).resources(attempt)[name]

        return value

    return {name: resource(name) for name in ("mem_mb", "runtime", "disk_mb")}


SHORT = needs(lambda model, wildcards: needs_of.Needs())  # what reads some numbers


def gpus_for(processes):
    """None on a cluster whose jobs run on CPUs; on one machine a GPU stands for whatever computes."""
    return 0 if CLUSTER and DEVICE == "cpu" else processes


def run_needs(model, wildcards, prompts, steps):
    """Of an engine on all its ranks: so many tokens of prompts, so many generation steps."""
    mapping, limits = Mapping(**layout_of(wildcards)), BuildLimits(**build_limits())
    return needs_of.run(model, recipe_of(wildcards), mapping, limits, prompts, steps, DEVICE)


def baseline_needs(model, wildcards, prompts, steps):
    dtype, limits = config["evaluation"]["baseline_dtype"], BuildLimits(**build_limits())
    return needs_of.baseline(model, dtype, limits, prompts, steps, DEVICE)


def text_of(wildcards):
    return needs_of.text_of(config_of(wildcards))


def summary_steps(wildcards):
    return needs_of.summary_steps(config_of(wildcards))


def task_work(wildcards):
    return needs_of.task_work(config_of(wildcards))


def benchmark_needs(model, wildcards):
    return run_needs(model, wildcards, *needs_of.benchmark_work(config_of(wildcards)))


def engine_needs(of):
    """Of what makes a rank's engine, or all of them."""

    def value(model, wildcards):
        mapping = Mapping(**layout_of(wildcards), rank=int(wildcards.get("rank", 0)))
        return of(model, recipe_of(wildcards), mapping, BuildLimits(**build_limits()))

    return needs(value)
