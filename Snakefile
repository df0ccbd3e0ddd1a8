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


if workflow.is_main_process:
    try:
        trtbuild_workflow.check_files_of_targets(sys.argv[1:], MODELS, workflow.rules)
    except UserError as error:
        raise WorkflowError(str(error)) from None


onsuccess:
    for text in rehearsal.verdicts([*sys.argv[1:], *(TARGETS if REHEARSE else [])]):
        print(f"\n{text}\n", file=sys.stderr)


workflow.localrules(*config.get("local_rules", []))  # of a cluster's profile
