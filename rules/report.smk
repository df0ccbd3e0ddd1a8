# Results -> one table a model.


rule table:
    input:
        lambda wildcards: [
            f"results/{wildcards.model}/{run}/{name}.json"
            for run, names in ({"hf": ("perplexity", "rouge")} | runs_of_table(wildcards)).items()
            for name in names
        ],
    output:
        "results/{model}/recipes.md",
    log:
        "results/{model}/logs/table.log",
    params:
        recipes=lambda wildcards: {
            run: trtbuild_workflow.weights_folder(recipes_of(wildcards)[split_run(run)[0]])
            for run in runs_of_table(wildcards)
        },
    resources:
        **SHORT,
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/table.py"
