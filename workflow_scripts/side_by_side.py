"""Rule side_by_side."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.stages import beside
    from trtbuild.files import atomic

    text = beside(Path(snakemake.input.ours), Path(snakemake.input.theirs))
    with atomic(snakemake.output[0]) as temporary:
        temporary.write_text(text, encoding="utf-8")
