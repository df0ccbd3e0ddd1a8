"""Rule checkpoint."""

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.checkpoint.sources import make_checkpoint

    make_checkpoint(snakemake.params.source, snakemake.output[0])
