"""Rules perplexity (an engine) and perplexity_hf (the Hugging Face model)."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.stages import measure_perplexity
    from trtbuild.files import write_json
    from trtbuild.launch import launch

    engine = snakemake.input.get("engine")
    hidden_states = (snakemake.input if engine else snakemake.output).hidden_states
    result = launch(
        snakemake.params.get("ranks", 1),
        measure_perplexity,
        model=snakemake.wildcards.model,
        checkpoint_dir=Path(snakemake.input.checkpoint),
        engine_dir=Path(engine).parent if engine else None,
        hidden_states=Path(hidden_states),
        mpi=snakemake.resources.get("mpi", ""),
        threads=snakemake.resources.get("cpus_per_task", snakemake.threads),
        **snakemake.params.options,
    )
    write_json(snakemake.output[0], result)
