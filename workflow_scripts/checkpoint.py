"""Rule checkpoint."""

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from functools import partial

    from trtbuild.checkpoint.sources import make_checkpoint
    from trtbuild.progress import made
    from trtbuild.workflow import check_new_checkpoint

    check = partial(check_new_checkpoint, snakemake.wildcards.model, snakemake.config)
    with made(snakemake.output[0]):
        make_checkpoint(snakemake.params.source, snakemake.output[0], check)
