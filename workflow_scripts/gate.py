"""Rule gate."""

from pathlib import Path

from trtbuild.workflow import rule_log

with rule_log(snakemake):
    from trtbuild.evaluation.gate import PERPLEXITY, gate, verdict
    from trtbuild.files import read_json, write_json

    value, baseline = (read_json(Path(snakemake.input[name]), PERPLEXITY) for name in ("perplexity", "baseline"))
    result = gate(value, baseline, **snakemake.params.limits)
    write_json(snakemake.output[0], result)
    print(f"{snakemake.output[0]}: {verdict(result)}")
