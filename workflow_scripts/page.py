"""Rule page."""

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.page import page
    from trtbuild.files import atomic, read_json

    with atomic(snakemake.output[0]) as temporary:
        temporary.write_text(page(read_json(snakemake.input[0])), encoding="utf-8")
