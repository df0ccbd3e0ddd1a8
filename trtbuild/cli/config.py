"""`--config config/config.yaml`: a command's options as the workflow has them, but for those that are given."""

from pathlib import Path
from typing import Annotated, Any

import typer


def _values(command: str, config: dict) -> dict[str, Any]:
    """What `config/config.yaml` says, by the names of a command's parameters; what it does not know is none of them."""
    build, evaluation, dataset = config["build"], config["evaluation"], config["evaluation"]["dataset"]
    capabilities = build["compute_capabilities"]
    sections = {
        "build": build
        | {"engine": build["engines"], "compute_capability": None if capabilities == "auto" else capabilities},
        "benchmark": evaluation | config["benchmark"],
    }
    evaluated = evaluation | {
        "max_input_len": build["max_input_len"],
        "dataset": dataset["name"],
        "split": dataset.get("split"),
        "samples": dataset["samples"],
        "dataset_config": dataset.get("config"),
        "dataset_revision": dataset.get("revision"),
    }
    return {"models": config["models"], "recipes": config["recipes"]} | sections.get(command, evaluated)


def _take(context: typer.Context, path: Path | None) -> Path | None:
    """Before other options are read."""
    if path:
        from trtbuild.files import user_path
        from trtbuild.workflow import SCHEMAS, validate
        from trtbuild.yaml_reader import read_yaml

        config = read_yaml(user_path(path))
        validate(config, SCHEMAS / "config.schema.yaml", str(path))
        context.default_map = _values(context.info_name or "", config)
    return path


Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="Take from this file, such as config/config.yaml, what no option says: what the workflow does.",
        is_eager=True,
        callback=_take,
    ),
]


def template_of(model: str, models: Path) -> str | None:
    """The chat template that a model is declared with; None where none is, or no such model."""
    from trtbuild.workflow import MODELS_SCHEMA, load_table

    return load_table(models, MODELS_SCHEMA).get(model, {}).get("chat_template")
