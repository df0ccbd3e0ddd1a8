"""Rule tensorrt_engine."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.engine.build import build_tensorrt

    portable, target = Path(snakemake.input.portable), Path(snakemake.output[0])
    build_tensorrt(portable, target, snakemake.params.remove_input_padding, snakemake.params.compute_capabilities)
