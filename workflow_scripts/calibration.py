"""Rule calibration."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.progress import made
    from trtbuild.quantization.calibration import calibrate

    with made(snakemake.output[0]):
        calibrate(Path(snakemake.input[0]), Path(snakemake.output[0]), **snakemake.params.settings)
