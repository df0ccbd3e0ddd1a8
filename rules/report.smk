# Results -> all of a model's recipes side by side, as data, a table and a page; two models' summaries side by side.


rule recipes:
    input:
        lambda wildcards: [
            f"results/{wildcards.model}/{run}/{name}.json"
            for run, names in runs_of_table(wildcards).items()
            for name in names
        ],
    output:
        "results/{model}/recipes.json",
    log:
        "results/{model}/logs/recipes.log",
    params:
        runs=runs_made_of,
    resources:
        **SHORT,
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/recipes.py"


rule table:
    input:
        "results/{model}/recipes.json",
    output:
        shown("results/{model}/recipes.md", "table"),
    log:
        "results/{model}/logs/table.log",
    resources:
        **SHORT,
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/table.py"


rule page:
    input:
        "results/{model}/recipes.json",
    output:
        shown("results/{model}/report.html", "report"),
    log:
        "results/{model}/logs/page.log",
    resources:
        **SHORT,
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/page.py"


rule side_by_side:
    input:
        ours="results/{model}/{recipe}{layout}/summaries.jsonl",
        our_meta="results/{model}/{recipe}{layout}/summaries.meta.json",
        theirs="results/{model}/hf/summaries.jsonl",
        their_meta="results/{model}/hf/summaries.meta.json",
    output:
        shown("results/{model}/{recipe}{layout}/side_by_side.md", "summaries beside the baseline's"),
    log:
        "results/{model}/{recipe}{layout}/logs/side_by_side.log",
    resources:
        **SHORT,
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/side_by_side.py"
