"""Rule side_by_side."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.stages import beside, score_summaries
    from trtbuild.files import atomic

    summaries = [Path(snakemake.input.ours), Path(snakemake.input.theirs)]
    text = beside(*summaries, list(map(score_summaries, summaries)))
    with atomic(snakemake.output[0]) as temporary:
        temporary.write_text(text, encoding="utf-8")
