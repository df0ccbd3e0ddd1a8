"""From a checkpoint to an engine folder: every rank's portable engine, its TensorRT engine, and `config.json`."""

import dataclasses
from pathlib import Path

import torch

import trtbuild
from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.decoder.mapping import Mapping
from trtbuild.decoder.sharding import shard
from trtbuild.engine.config import BuildLimits, marker, rank_file, write_config
from trtbuild.engine.portable import read_portable, write_portable
from trtbuild.errors import UserError
from trtbuild.files import atomic, refuse_output_over_input, sha256
from trtbuild.models.config import ModelConfig
from trtbuild.progress import byte_bar


def check_positions(config: ModelConfig, limits: BuildLimits) -> None:
    """Raises `UserError` for an engine with more positions than its model was made for."""
    if limits.max_length > config.positions:
        raise UserError(
            f"max_input_len {limits.max_input_len} and max_output_len {limits.max_output_len} are more than the "
            f"{config.positions:g} positions that the model was made for (max_position_embeddings); take less, or give "
            "extrapolate_positions (--extrapolate-positions)"
        )


def build_portable(
    checkpoint: Path | Checkpoint,
    path: Path,
    dtype: torch.dtype,
    limits: BuildLimits,
    mapping: Mapping,
    cache: CacheScales | None = None,
    extrapolate_positions: bool = False,
) -> None:
    """Writes one rank's portable engine: its network and its share of the weights.

    Weights are as in the checkpoint, quantized or not, and what is not quantized is in `dtype`. Raises `UserError` for
    a tensor that does not fit in that, before a file is there, and for more positions than the model was made for,
    unless `extrapolate_positions`; and for a model that `mapping`'s ranks cannot share (`shard`).
    """
    checkpoint = _opened(checkpoint)
    if not extrapolate_positions:
        check_positions(checkpoint.config, limits)
    weights = lambda name: checkpoint[name].fitting(dtype, name)
    config, weights, cache = shard(checkpoint.config, weights, cache, mapping)
    network = decoder(config, weights, dtype, limits.max_length, cache, mapping)
    total = sum(constant.nbytes for constant in network.constants.values())
    with byte_bar(total, path.name) as bar:
        write_portable(path, network, limits, bar.update)


def _opened(checkpoint: Path | Checkpoint) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else Checkpoint(checkpoint)


def build_tensorrt(
    portable: Path, path: Path, remove_input_padding: bool, compute_capabilities: list[str] | None = None
) -> None:
    """Lowers one rank's portable engine and writes its serialized TensorRT engine to `path`."""
    from trtbuild.engine.tensorrt import LoweredNetwork

    network, limits = read_portable(portable)
    engine = LoweredNetwork(network, remove_input_padding).build(limits, compute_capabilities)
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(engine)


def write_engine_config(
    folder: Path,
    checkpoint: Path | Checkpoint,
    *,
    model: str,
    recipe: dict,
    recipe_name: str | None,
    limits: BuildLimits,
    mapping: Mapping,
    engines: list[str],
    remove_input_padding: bool,
    compute_capabilities: list[str] | None = None,
    calibration: Path | None = None,
) -> None:
    """Writes `config.json`: model, recipe, mapping, limits, builders, and the sha256 of source, inputs and outputs.

    Files of ranks that `mapping`, which is any rank's, does not have are removed: they are another layout's, which the
    folder was for before. `calibration` is the file that a quantized KV cache's scales come from.
    """
    checkpoint = _opened(checkpoint)
    builders = {"portable": {"trtbuild": trtbuild.__version__, "torch": torch.__version__}}
    if "tensorrt" in engines:
        from trtbuild.engine.tensorrt_api import describe_builder

        network, _ = read_portable(folder / rank_file(0, "portable"))
        builders["tensorrt"] = describe_builder(compute_capabilities, network.holds(torch.float8_e4m3fn))
    write_config(
        folder,
        [rank_file(rank, kind) for rank in range(mapping.world_size) for kind in engines],
        model=model,
        recipe=recipe,
        **({"recipe_name": recipe_name} if recipe_name else {}),
        model_config=dataclasses.asdict(checkpoint.config),
        mapping=mapping.layout,
        limits=dataclasses.asdict(limits),
        remove_input_padding=remove_input_padding,
        builders=builders,
        inputs=checkpoint.hashes | ({calibration.name: sha256(calibration)} if calibration else {}),
        source_sha256=checkpoint.source_sha256,
        **marker(model),
    )
    for path in folder.glob("rank*"):
        if (number := path.stem.removeprefix("rank")).isdecimal() and int(number) >= mapping.world_size:
            path.unlink()


def build_engine_dir(
    checkpoint: Path | Checkpoint,
    folder: Path,
    *,
    model: str,
    recipe: dict,
    recipe_name: str | None = None,
    limits: BuildLimits,
    engines: list[str],
    mapping: Mapping = Mapping(),
    remove_input_padding: bool = True,
    compute_capabilities: list[str] | None = None,
    cache: CacheScales | None = None,
    calibration: Path | None = None,
    extrapolate_positions: bool = False,
) -> None:
    """Builds a whole engine folder, one rank after another; it appears only when it is complete.

    `recipe` and its name are what `config.json` records; its `dtype` is that of what is not quantized. `cache`: the
    scales of a quantized KV cache, and `calibration` the file that they come from; `extrapolate_positions` as in
    `build_portable`.
    """
    if "tensorrt" in engines:
        from trtbuild.engine.tensorrt_api import api

        api()  # a missing distribution is better said before the work than after
    if "portable" not in engines:
        raise UserError(
            "a TensorRT engine is lowered from the portable one; build with --engine portable --engine tensorrt"
        )
    checkpoint = _opened(checkpoint)
    if checkpoint.files:
        refuse_output_over_input(folder, checkpoint.folder)
    dtype = getattr(torch, recipe["dtype"])
    with atomic(folder) as temporary:
        temporary.mkdir()
        for own in mapping.ranks:
            portable = temporary / rank_file(own.rank, "portable")
            build_portable(checkpoint, portable, dtype, limits, own, cache, extrapolate_positions)
            if "tensorrt" in engines:
                target = temporary / rank_file(own.rank, "tensorrt")
                build_tensorrt(portable, target, remove_input_padding, compute_capabilities)
        write_engine_config(
            temporary,
            checkpoint,
            model=model,
            recipe=recipe,
            recipe_name=recipe_name,
            limits=limits,
            mapping=mapping,
            engines=engines,
            remove_input_padding=remove_input_padding,
            compute_capabilities=compute_capabilities,
            calibration=calibration,
        )
