# trtbuild: published LLM weights -> checkpoint -> engines -> summaries -> scores.
# snakemake results/smollm2-135m/fp16/rouge.json

from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/checkpoint.smk"
include: "rules/calibrate.smk"
include: "rules/quantize.smk"
include: "rules/engine.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"


rule all:
    input:
        TARGETS,
    default_target: True
