"""Rule recipes."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.recipes import collect
    from trtbuild.files import write_json

    write_json(snakemake.output[0], collect(Path("results", snakemake.wildcards.model), snakemake.params.runs))
