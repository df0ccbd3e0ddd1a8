"""Rule quantize: by a recipe, or from published weights."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.progress import made

    checkpoint, folder = Path(snakemake.input.checkpoint), Path(snakemake.output[0])
    if source := snakemake.params.source:
        from trtbuild.checkpoint.sources import make_quantized

        with made(folder):
            make_quantized(source, checkpoint, folder)
    else:
        from trtbuild.quantization.quantize import quantize
        from trtbuild.quantization.recipe import Quantization

        calibration = snakemake.input.get("calibration")
        quantization = Quantization.parse(snakemake.params.quantization)
        with made(folder):
            quantize(checkpoint, folder, quantization, Path(calibration) if calibration else None)
