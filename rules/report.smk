# Results -> one table a model.


rule table:
    input:
        lambda wildcards: [
            f"results/{wildcards.model}/{run}/{name}.json"
            for run in ["hf", *runs_of_matrix(wildcards)]
            for name in ("perplexity", "rouge")
        ],
    output:
        "results/{model}/recipes.md",
    log:
        "results/{model}/logs/table.log",
    params:
        recipes=runs_of_matrix,
    resources:
        **SHORT,
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/table.py"
