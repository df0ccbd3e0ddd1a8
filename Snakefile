# trtbuild: published LLM weights -> checkpoint -> engines -> summaries -> scores.
# snakemake results/smollm2-135m/fp16/rouge.json

from pathlib import Path

from snakemake.utils import min_version

from trtbuild.files import check_input

min_version("9.0")
if Path("config/config.yaml").exists():
    check_input("config/config.yaml")  # reading a pipe would never end


configfile: "config/config.yaml"


if "container" in config:

    container: config["container"]


include: "rules/common.smk"
include: "rules/checkpoint.smk"
include: "rules/calibrate.smk"
include: "rules/quantize.smk"
include: "rules/engine.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"


rule all:
    input:
        default_targets,
    default_target: True


workflow.localrules(*config.get("local_rules", []))  # of a cluster's profile
