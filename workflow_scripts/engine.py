"""Rule engine."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.decoder.mapping import Mapping
    from trtbuild.engine.build import write_engine_config
    from trtbuild.engine.config import BuildLimits

    calibration = snakemake.input.get("cache")
    write_engine_config(
        Path(snakemake.output[0]).parent,
        Path(snakemake.input.weights),
        model=snakemake.wildcards.model,
        recipe=snakemake.params.recipe,
        recipe_name=snakemake.wildcards.recipe,
        limits=BuildLimits(**snakemake.params.limits),
        mapping=Mapping(**snakemake.params.layout),
        engines=snakemake.params.engines,
        calibration=Path(calibration) if calibration else None,
        **snakemake.params.options,
    )
