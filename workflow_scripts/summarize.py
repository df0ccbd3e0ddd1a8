"""Rules summarize (an engine) and summarize_hf (the Hugging Face model)."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.stages import summarize_articles
    from trtbuild.launch import launch

    engine = snakemake.input.get("engine")
    launch(
        snakemake.params.get("ranks", 1),
        summarize_articles,
        output=Path(snakemake.output.summaries),
        model=snakemake.wildcards.model,
        checkpoint_dir=Path(snakemake.input.checkpoint),
        engine_dir=Path(engine).parent if engine else None,
        chat_template=snakemake.params.chat_template,
        mpi=snakemake.resources.get("mpi", ""),
        threads=snakemake.resources.get("cpus_per_task", snakemake.threads),
        **snakemake.params.options,
    )
