# Results -> one table a model; two models' summaries side by side.


rule table:
    input:
        lambda wildcards: [
            f"results/{wildcards.model}/{run}/{name}.json"
            for run, names in ({"hf": ("perplexity", "rouge")} | runs_of_table(wildcards)).items()
            for name in names
        ],
    output:
        report("results/{model}/recipes.md", category="Recipes", labels={"model": "{model}"}),
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


rule side_by_side:
    input:
        ours="results/{model}/{recipe}{layout}/summaries.jsonl",
        our_meta="results/{model}/{recipe}{layout}/summaries.meta.json",
        theirs="results/{model}/hf/summaries.jsonl",
        their_meta="results/{model}/hf/summaries.meta.json",
    output:
        "results/{model}/{recipe}{layout}/side_by_side.md",
    log:
        "results/{model}/{recipe}{layout}/logs/side_by_side.log",
    resources:
        **SHORT,
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/side_by_side.py"
