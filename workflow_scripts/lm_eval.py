"""Rules lm_eval (an engine) and lm_eval_hf (the Hugging Face model)."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.tasks import measure_task
    from trtbuild.files import read_json, write_json
    from trtbuild.launch import launch

    if gate := snakemake.input.get("gate"):
        from trtbuild.evaluation.gate import GATE, check_gate

        check_gate(read_json(gate, GATE), gate)
    engine = snakemake.input.get("engine")
    result = launch(
        snakemake.params.get("ranks", 1),
        measure_task,
        task=snakemake.wildcards.task,
        model=snakemake.wildcards.model,
        checkpoint_dir=Path(snakemake.input.checkpoint),
        engine_dir=Path(engine).parent if engine else None,
        mpi=snakemake.resources.get("mpi", ""),
        threads=snakemake.resources.get("cpus_per_task", snakemake.threads),
        **snakemake.params.options,
    )
    write_json(snakemake.output[0], result)
