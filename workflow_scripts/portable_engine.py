"""Rule portable_engine."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.decoder.mapping import Mapping
    from trtbuild.engine.build import build_portable
    from trtbuild.engine.config import BuildLimits
    from trtbuild.quantization.kv_cache import cache_of

    limits, mapping = BuildLimits(**snakemake.params.limits), Mapping(rank=int(snakemake.wildcards.rank))
    weights, recipe, calibration = Path(snakemake.input.weights), snakemake.params.recipe, snakemake.input.get("cache")
    cache = cache_of(recipe, weights, Path(calibration) if calibration else None)
    extrapolate = snakemake.params.extrapolate_positions
    build_portable(weights, Path(snakemake.output[0]), recipe, limits, mapping, cache, extrapolate)
