"""Rule rouge."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.stages import rouge_table, score_summaries
    from trtbuild.files import write_json

    result = score_summaries(Path(snakemake.input.summaries))
    write_json(snakemake.output[0], result)
    print(rouge_table([result]))
