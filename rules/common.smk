# The configuration, validated, and what rules share.

import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from trtbuild import workflow as trtbuild_workflow
from trtbuild.engine.config import rank_file
from trtbuild.errors import UserError

trtbuild_workflow.export_package(workflow.basedir)

SCHEMAS = Path(workflow.basedir, "config", "schemas")

try:
    trtbuild_workflow.validate(config, SCHEMAS / "config.schema.yaml", "config/config.yaml")
    trtbuild_workflow.check_limits(config)
    MODELS = trtbuild_workflow.load_table(config["models"], SCHEMAS / "models.schema.yaml")
    RECIPES = trtbuild_workflow.load_table(config["recipes"], SCHEMAS / "recipes.schema.yaml")
    TARGETS = trtbuild_workflow.matrix_targets(config)
    # Targets are only known from the command line here; a wrong name would else end as "missing input files".
    trtbuild_workflow.check_targets([*sys.argv[1:], *TARGETS], MODELS, RECIPES)
except UserError as error:
    raise WorkflowError(str(error)) from None


wildcard_constraints:
    model="|".join(map(re.escape, MODELS)),
    recipe="|".join(map(re.escape, RECIPES)),
    run="|".join(map(re.escape, [*RECIPES, "hf"])),
    rank=r"\d+",


def build_limits():
    return {key: config["build"][key] for key in ("max_batch_size", "max_input_len", "max_output_len")}


def tensorrt_options():
    """How the network is lowered, and for which GPUs: the latter matters only where an engine is built."""
    options = {"remove_input_padding": config["build"]["remove_input_padding"]}
    if "tensorrt" in config["build"]["engines"]:
        options["compute_capabilities"] = config["build"]["compute_capabilities"]
    return options


def engine_files(wildcards):
    """Every rank's file of every kind of engine that is asked for."""
    folder = f"results/{wildcards.model}/{wildcards.recipe}/engine"
    return [f"{folder}/{rank_file(0, kind)}" for kind in config["build"]["engines"]]


def evaluation(*keys):
    return {key: config["evaluation"][key] for key in keys}


def baseline_limits():
    """The Hugging Face model sees as much of an article as the engines do."""
    return {"max_input_len": config["build"]["max_input_len"]}
