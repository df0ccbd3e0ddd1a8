# Published weights -> canonical checkpoint.


rule checkpoint:
    output:
        directory("results/{model}/checkpoint"),
    log:
        "results/{model}/logs/checkpoint.log",
    params:
        source=lambda wildcards: MODELS[wildcards.model]["source"],
        files=lambda wildcards: source_state(MODELS[wildcards.model]["source"]),
    resources:
        **needs(
            lambda model, wildcards: needs_of.checkpoint(
                model,
                trtbuild_workflow.bytes_of_source(MODELS[wildcards.model]["source"]),
                MODELS[wildcards.model]["source"].get("dummy", {}).get("dtype", "float32"),
            )
        ),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/checkpoint.py"
