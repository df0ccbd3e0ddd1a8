"""Rule portable_engine."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.engine.build import build_portable
    from trtbuild.engine.config import BuildLimits
    from trtbuild.models.mapping import Mapping

    limits, mapping = BuildLimits(**snakemake.params.limits), Mapping(rank=int(snakemake.wildcards.rank))
    target = Path(snakemake.output[0])
    build_portable(Path(snakemake.input.checkpoint), target, snakemake.params.recipe, limits, mapping)
