"""Rule portable_engine."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    import torch

    from trtbuild.decoder.mapping import Mapping
    from trtbuild.engine.build import build_portable
    from trtbuild.engine.config import BuildLimits
    from trtbuild.progress import made
    from trtbuild.quantization.kv_cache import cache_of
    from trtbuild.quantization.recipe import Recipe

    limits = BuildLimits(**snakemake.params.limits)
    mapping = Mapping(**snakemake.params.layout, rank=int(snakemake.wildcards.rank))
    weights, calibration = Path(snakemake.input.weights), snakemake.input.get("cache")
    recipe = Recipe.parse(snakemake.params.recipe)
    cache = cache_of(recipe, weights, Path(calibration) if calibration else None)
    extrapolate, dtype = snakemake.params.extrapolate_positions, getattr(torch, recipe.dtype)
    with made(snakemake.output[0]):
        build_portable(weights, Path(snakemake.output[0]), dtype, limits, mapping, cache, extrapolate)
