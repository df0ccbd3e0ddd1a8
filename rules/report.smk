# Results -> one table a model.


rule table:
    input:
        lambda wildcards: [
            f"results/{wildcards.model}/{run}/{name}.json"
            for run in ["hf", *recipes_of_matrix(wildcards)]
            for name in ("perplexity", "rouge")
        ],
    output:
        "results/{model}/recipes.md",
    log:
        "results/{model}/logs/table.log",
    params:
        recipes=lambda wildcards: {
            recipe: trtbuild_workflow.weights_folder(recipes_of(wildcards)[recipe])
            for recipe in recipes_of_matrix(wildcards)
        },
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/table.py"
