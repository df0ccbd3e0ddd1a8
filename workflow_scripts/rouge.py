"""Rule rouge."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.stages import rouge_table, score_summaries
    from trtbuild.files import read_json, write_json

    if gate := snakemake.input.get("gate"):
        from trtbuild.evaluation.gate import GATE, check_gate

        check_gate(read_json(gate, GATE), gate)
    result = score_summaries(Path(snakemake.input.summaries))
    write_json(snakemake.output[0], result)
    print(rouge_table([result]))
