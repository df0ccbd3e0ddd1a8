"""Options that commands share: one name means one thing in all of them."""

from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trtbuild.datasets import is_file
from trtbuild.errors import UserError
from trtbuild.files import output_path
from trtbuild.quantization.recipe import Recipe


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Engine(StrEnum):
    portable = "portable"
    tensorrt = "tensorrt"


class Peer(StrEnum):
    transformers = "transformers"


class Runtime(StrEnum):
    auto = "auto"
    portable = "portable"
    tensorrt = "tensorrt"
    interpreted = "interpreted"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


MODELS, RECIPES = Path("config/models.yaml"), Path("config/recipes.yaml")  # where a project has them


def complete(incomplete: str, *files: Path) -> list[str]:
    """What a shell completes a model's or a recipe's name to."""
    from trtbuild.yaml_reader import read_yaml

    with suppress(UserError):
        names = [name for file in files if file.exists() for name in read_yaml(file) or ()]
        return [name for name in dict.fromkeys(names) if name.startswith(incomplete)]
    return []


def recipe_names(incomplete: str) -> list[str]:
    from trtbuild.workflow import SHIPPED_RECIPES

    return complete(incomplete, SHIPPED_RECIPES, RECIPES)


def writable(path: Path | None) -> Path | None:
    return output_path(path) if path else None


CheckpointDir = Annotated[Path, typer.Option(help="Canonical checkpoint: config.json, safetensors, tokenizer.")]
EngineDir = Annotated[Path, typer.Option(help="Engine folder, as written by 'build'.")]
RuntimeOption = Annotated[Runtime, typer.Option(help="auto: TensorRT where it can run here, else portable.")]
DeviceOption = Annotated[Device, typer.Option(help="Where the portable engine runs; auto: the GPU if there is one.")]
Check = Annotated[
    bool, typer.Option("--check", help="Compare every byte of the engine's files with what was built, by sha256.")
]
BaselineDtype = Annotated[Dtype, typer.Option(help="Dtype of the Hugging Face model.")]
BaselineEngineDir = Annotated[Path | None, typer.Option(help="Engine folder; without it, the Hugging Face model runs.")]
TokenizerDir = Annotated[Path, typer.Option(help="Folder with tokenizer.json; the checkpoint's will do.")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="With --chat: one that trtbuild has, such as qwen, or a .jinja file; default: the tokenizer's."),
]
Samples = Annotated[int, typer.Option("--samples", "--max-ite", help="How many articles, from the first.")]
Dataset = Annotated[
    str, typer.Option(help="trtbuild-news (shipped), a .jsonl file, or a data set of the hub, with the same columns.")
]
DatasetConfig = Annotated[str | None, typer.Option(help="Configuration of a hub data set, such as 3.0.0.")]
DatasetRevision = Annotated[str | None, typer.Option(help="Revision of a hub data set.")]
Split = Annotated[str, typer.Option(help="Split of the data set: evaluation or calibration of trtbuild-news.")]

Models = Annotated[Path, typer.Option(help="File that declares the models.")]
ModelVersion = Annotated[
    str | None, typer.Option(help="Which version it is, where config.json does not tell, such as v2_13b.")
]
Dummy = Annotated[
    str | None,
    typer.Option(
        help="Random weights in the shape of a model: a name from --models, or a config.json.",
        autocompletion=lambda incomplete: complete(incomplete, MODELS),
    ),
]
NumLayers = Annotated[int | None, typer.Option(help="Layers of the dummy model; default: as many as the real one has.")]
RECIPE = typer.Option(help="A recipe's name: a shipped one, or one of --recipes.", autocompletion=recipe_names)
Recipes = Annotated[
    Path | None,
    typer.Option(help="File of recipes beside the shipped ones; default: config/recipes.yaml, where there is one."),
]
Calibration = Annotated[
    Path | None, typer.Option(help="File of 'calibrate'; for recipes with quantized activations or KV cache.")
]


def dataset_of(name: str, config: str | None, revision: str | None, split: str) -> dict:
    """A data set as the configuration has it, but for the number of samples; a file has no splits."""
    options = {"name": name, "config": config, "revision": revision, "split": None if is_file(name) else split}
    return {key: value for key, value in options.items() if value is not None}


def dummy_of(name: str, models: Path, model_version: str | None) -> tuple[str, dict]:
    """Name and source of dummy weights of a declared model, of a config.json or of its folder."""
    from trtbuild.rehearsal import dummy_source, shape_of
    from trtbuild.workflow import MODELS_SCHEMA, load_table, unknown

    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    version = {"model_version": model_version} if model_version else {}
    if file.suffix == ".json" or file.is_file():
        shape = file.resolve().parent.name if file.stem == "config" else file.stem
        return shape, {"config": str(file)} | version
    if not models.exists():
        raise UserError(f"{models} does not exist, which would declare {name!r}; give --models or a config.json")
    table = load_table(str(models), MODELS_SCHEMA)
    if name not in table:
        raise UserError(f"{unknown('model', name, table)}; or give a config.json")
    if not shape_of(table[name]):
        raise UserError(f"{models} has no 'config' for {name}; add its published config.json there, or give that file")
    return name, dummy_source(table[name]) | version


def recipe_of(name: str, path: Path | None) -> Recipe:
    """A recipe of the project, or else a shipped one."""
    from trtbuild.workflow import RECIPES_SCHEMA, load_recipes, load_table

    if path is None and RECIPES.exists():
        path = RECIPES
    recipes = load_recipes(path)
    if name not in recipes:
        shipped = ", ".join(sorted(load_recipes(None)))
        if not path:
            raise UserError(f"trtbuild has no recipe {name!r}; it has {shipped}")
        own = ", ".join(sorted(load_table(path, RECIPES_SCHEMA))) or "none"
        raise UserError(f"{path} has no recipe {name!r}; it has {own}; trtbuild has {shipped}")
    return recipes[name]
