"""Rule benchmark."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.stages import run_benchmark
    from trtbuild.files import write_json
    from trtbuild.launch import launch

    result = launch(
        snakemake.params.ranks,
        run_benchmark,
        engine_dir=Path(snakemake.input.engine).parent,
        **snakemake.params.sizes,
        mpi=snakemake.resources.get("mpi", ""),
        threads=snakemake.resources.get("cpus_per_task", snakemake.threads),
        **snakemake.params.options,
    )
    write_json(snakemake.output[0], result)
