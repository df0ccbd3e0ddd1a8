"""Rule gate."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.gate import PERPLEXITY, gate
    from trtbuild.files import read_json, write_json

    value, baseline = (read_json(Path(snakemake.input[name]), PERPLEXITY) for name in ("perplexity", "baseline"))
    write_json(snakemake.output[0], gate(value, baseline, **snakemake.params.limits))
