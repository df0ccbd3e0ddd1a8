"""Rule benchmark."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.stages import run_benchmark
    from trtbuild.files import write_json

    folder = Path(snakemake.input.engine).parent
    write_json(snakemake.output[0], run_benchmark(folder, **snakemake.params.sizes, **snakemake.params.options))
