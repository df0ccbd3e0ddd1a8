"""Rule tensorrt_engine."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.engine.build import build_tensorrt
    from trtbuild.progress import made

    with made(snakemake.output[0]):
        build_tensorrt(Path(snakemake.input.portable), Path(snakemake.output[0]), **snakemake.params.options)
