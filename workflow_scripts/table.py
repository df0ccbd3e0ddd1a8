"""Rule table."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.table import recipe_table
    from trtbuild.files import atomic

    table = recipe_table(Path("results", snakemake.wildcards.model), snakemake.params.recipes)
    with atomic(snakemake.output[0]) as temporary:
        temporary.write_text(table, encoding="utf-8")
    print(table)
