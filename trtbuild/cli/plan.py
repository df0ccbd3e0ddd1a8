"""What comes of it, before anything is built."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trtbuild.cli.options import MODELS, ModelVersion, complete, recipe_names


def gpu_names(incomplete: str) -> list[str]:
    from trtbuild.evaluation.gpu_table import GPUS

    return [name for name in GPUS if name.startswith(incomplete)]


def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="A declared model that has a 'config', or a config.json.",
            autocompletion=lambda incomplete: complete(incomplete, MODELS),
        ),
    ],
    gpu: Annotated[
        list[str] | None, typer.Option(help="Such as h100-80gb; repeatable.", autocompletion=gpu_names)
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="Repeatable, also as RECIPE@tp2; default: the matrix's, or all there are.",
            autocompletion=recipe_names,
        ),
    ] = None,
    layout: Annotated[
        list[str] | None, typer.Option(help="Such as tp2 or tp2pp2, repeatable; default: the model's own.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="What is built and scored; default: config/config.yaml, where there is one.")
    ] = None,
    model_version: ModelVersion = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object (docs/formats.md).")] = False,
) -> None:
    """What recipes of a model take on a GPU, before they are built. And what making them takes, from shapes alone.

    Example: trtbuild plan llama2-70b --gpu h100-80gb --gpu a100-40gb --recipe fp16 --recipe awq --layout tp2
    """
    from trtbuild import planning

    declared, settings, recipes = planning.declared(model, config, model_version)
    runs = planning.runs(declared, settings, recipes, recipe, layout)
    result = planning.plan(declared, settings, recipes, runs, gpu or [])
    print(json.dumps(result, allow_nan=False) if as_json else planning.table(result))
