"""Engines: made, described, and compared with the model that they were made of."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from trtbuild.cli.config import Config
from trtbuild.cli.options import (
    MODELS,
    RECIPE,
    Calibration,
    Check,
    CheckpointDir,
    Dtype,
    Dummy,
    Engine,
    EngineDir,
    Models,
    ModelVersion,
    NumLayers,
    Recipes,
    Runtime,
    dummy_of,
    recipe_of,
    writable,
)
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.progress import made
from trtbuild.quantization.recipe import Recipe

NO_WEIGHTS = "give --checkpoint-dir, or --dummy MODEL for random weights"


def build(
    output_dir: Annotated[Path, typer.Option(help="Where the engine folder goes.", callback=writable)],
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Canonical checkpoint, or for a recipe with weights what 'quantize' made of it.")
    ] = None,
    dummy: Dummy = None,
    num_layers: NumLayers = None,
    model_version: ModelVersion = None,
    models: Models = MODELS,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of what is not quantized; default: the recipe's, or float16.")
    ] = None,
    recipe: Annotated[str | None, RECIPE] = None,
    recipes: Recipes = None,
    calibration: Calibration = None,
    engine: Annotated[
        list[Engine], typer.Option(help="Which engines; repeat for both. TensorRT needs the portable one.")
    ] = [  # noqa: B006
        Engine.portable
    ],
    tp_size: Annotated[int, typer.Option(help="Ranks that share each layer (tensor parallelism).")] = 1,
    pp_size: Annotated[int, typer.Option(help="Stages of layers that follow one another (pipeline parallelism).")] = 1,
    use_parallel_embedding: Annotated[
        bool, typer.Option(help="Ranks share the vocabulary of the embedding and the output product, if it divides.")
    ] = True,
    max_batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 8,
    max_input_len: Annotated[int, typer.Option(help="Tokens in a prompt.")] = 1024,
    max_output_len: Annotated[int, typer.Option(help="Tokens generated after a prompt.")] = 128,
    extrapolate_positions: Annotated[
        bool, typer.Option("--extrapolate-positions", help="Allow more positions than the model was made for.")
    ] = False,
    remove_input_padding: Annotated[bool, typer.Option(help="TensorRT: packed tokens outside attention.")] = True,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="TensorRT-RTX: GPU generations to build for, such as 8.9; repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model name to record; default: the checkpoint folder's, or dummy/NAME.")
    ] = None,
    config: Config = None,
) -> None:
    """Build an engine folder: one file per rank and config.json.

    Example: trtbuild build --checkpoint-dir checkpoint --output-dir engine --engine portable --engine tensorrt

    On two GPUs: trtbuild build --checkpoint-dir checkpoint --output-dir engine --tp-size 2

    Without weights, as large as the real one: trtbuild build --dummy llama2-70b --num-layers 2 --recipe int8kv
    --output-dir engine
    """
    from trtbuild.checkpoint.canonical import Checkpoint
    from trtbuild.checkpoint.sources import dummy_model
    from trtbuild.decoder.mapping import Mapping
    from trtbuild.decoder.sharding import check_mapping
    from trtbuild.engine.build import build_engine_dir, check_positions
    from trtbuild.quantization.kv_cache import cache_of
    from trtbuild.quantization.quantize import check_weights
    from trtbuild.rehearsal import dummy_weights, small_calibration

    if recipe and dtype:
        raise UserError("--dtype and --recipe contradict each other; the recipe has a dtype")
    _check_weights_options(checkpoint_dir, dummy, num_layers, calibration, model)
    content = recipe_of(recipe, recipes) if recipe else Recipe.parse({"dtype": dtype or Dtype.float16.value})
    limits = BuildLimits(max_batch_size, max_input_len, max_output_len)
    mapping = Mapping(tp_size, pp_size, use_parallel_embedding=use_parallel_embedding)
    if Engine.tensorrt in engine:
        from trtbuild.engine.tensorrt_api import describe_builder

        describe_builder(compute_capability, content.fp8)  # what it refuses is better said before the work than after
    with made(output_dir), ExitStack() as stack:
        source: Path | Checkpoint
        if dummy:
            name, shape = dummy_of(dummy, models, model_version)
            model = model or f"dummy/{name}"
            # Random weights need no text of their own.
            settings = {key: value for key, value in content.settings.items() if key != "calibration"}
            content = small_calibration(Recipe.parse(settings))
            if not extrapolate_positions:
                check_positions(dummy_model(**shape)[1].config, limits)
            check_mapping(dummy_model(**shape | {"num_layers": num_layers})[1].config, mapping, content.group_size)
            weights = dummy_weights(shape | {"num_layers": num_layers}, content, output_dir)
            source, calibration = stack.enter_context(weights)
        elif checkpoint_dir:
            source = checkpoint_dir
            model = model or checkpoint_dir.resolve().name
        else:
            raise UserError(NO_WEIGHTS)
        cache = None
        if isinstance(source, Path):  # dummy weights that nothing quantizes lie in no folder
            check_weights(content, source)
            cache = cache_of(content, source, calibration)
        build_engine_dir(
            source,
            output_dir,
            model=model,
            recipe=content.engine_settings,
            recipe_name=recipe,
            limits=limits,
            engines=[e.value for e in engine],
            mapping=mapping,
            remove_input_padding=remove_input_padding,
            compute_capabilities=compute_capability,
            cache=cache,
            calibration=calibration if content.kv_cache else None,
            extrapolate_positions=extrapolate_positions,
        )


def _check_weights_options(
    checkpoint_dir: Path | None,
    dummy: str | None,
    num_layers: int | None,
    calibration: Path | None,
    model: str | None,
) -> None:
    """Raises `UserError` unless `build` knows from one place which weights to take."""
    if checkpoint_dir and dummy:
        raise UserError("--checkpoint-dir has weights, --dummy stands for a model without; give one")
    if not (checkpoint_dir or dummy):
        raise UserError(NO_WEIGHTS)
    if dummy and model:
        raise UserError("--model would give dummy weights a real model's name; leave it out")
    if num_layers is not None and not dummy:
        raise UserError("--num-layers is for --dummy; an engine has all layers of a checkpoint")
    if calibration and dummy:
        raise UserError("--calibration is of a real model; --dummy weights are calibrated by themselves, leave it out")


def verify(
    engine_dir: EngineDir,
    checkpoint_dir: CheckpointDir,
    input_text: Annotated[
        list[str] | None, typer.Option(help="A prompt; repeatable. Default: three short ones.")
    ] = None,
    max_output_len: Annotated[int, typer.Option(help="Greedy tokens to compare.")] = 8,
    runtime: Annotated[
        list[Runtime] | None, typer.Option(help="What to compare; default: interpreted (where TensorRT is), portable.")
    ] = None,
) -> None:
    """Compare an engine with the Hugging Face model in float32. Logits and greedy tokens; exit 1 on disagreement.

    Where transformers has no such model (ALiBi), the portable engine in float32 is what is compared with.

    Example: trtbuild verify --engine-dir engine --checkpoint-dir checkpoint
    """
    from trtbuild.evaluation.stages import verify_engine

    agreements = verify_engine(
        engine_dir, checkpoint_dir, input_text, max_output_len, [r.value for r in runtime] if runtime else None
    )
    header = (f"compared with {agreements[0].baseline}, float32", "logits error", "limit", "equal tokens", "verdict")
    print("{:36} {:>12} {:>8} {:>13} {:>9}".format(*header))
    for a in agreements:
        verdict = "agrees" if a.agrees else "DIFFERS"
        print(f"{a.name:36} {a.relative_error:12.2e} {a.tolerance:8.1e} {a.equal_tokens:>6}/{a.tokens:<6} {verdict:>9}")
    if not all(a.agrees for a in agreements):
        raise typer.Exit(1)


def inspect(
    engine_dir: Annotated[Path | None, typer.Option(help="Engine folder to describe.")] = None,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Checkpoint to describe.")] = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="List the network's operations.")] = False,
    check: Check = False,
) -> None:
    """Describe an engine folder or a checkpoint.

    Example: trtbuild inspect --engine-dir engine --nodes
    """
    from trtbuild.evaluation.describe import describe_checkpoint, describe_engine

    if engine_dir and not checkpoint_dir:
        print(describe_engine(engine_dir, nodes, check))
    elif checkpoint_dir and not engine_dir:
        print(describe_checkpoint(checkpoint_dir))
    else:
        raise UserError("give one of --engine-dir and --checkpoint-dir")
