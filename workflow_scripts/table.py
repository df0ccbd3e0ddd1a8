"""Rule table."""

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.table import recipe_table
    from trtbuild.files import atomic, read_json

    table = recipe_table(read_json(snakemake.input[0]))
    with atomic(snakemake.output[0]) as temporary:
        temporary.write_text(table, encoding="utf-8")
    print(table)
