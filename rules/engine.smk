# Canonical checkpoint -> one engine file per rank and kind -> config.json.


rule portable_engine:
    input:
        checkpoint="results/{model}/checkpoint",
    output:
        "results/{model}/{recipe}/engine/rank{rank}.safetensors",
    log:
        "results/{model}/{recipe}/logs/portable_engine.rank{rank}.log",
    params:
        recipe=lambda wildcards: RECIPES[wildcards.recipe],
        limits=build_limits(),
    threads: 4
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/portable_engine.py"


rule tensorrt_engine:
    input:
        portable="results/{model}/{recipe}/engine/rank{rank}.safetensors",
    output:
        "results/{model}/{recipe}/engine/rank{rank}.engine",
    log:
        "results/{model}/{recipe}/logs/tensorrt_engine.rank{rank}.log",
    params:
        options=tensorrt_options(),
    threads: 4
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/tensorrt_engine.py"


rule engine:
    input:
        checkpoint="results/{model}/checkpoint",
        files=engine_files,
    output:
        "results/{model}/{recipe}/engine/config.json",
    log:
        "results/{model}/{recipe}/logs/engine.log",
    params:
        recipe=lambda wildcards: RECIPES[wildcards.recipe],
        limits=build_limits(),
        engines=config["build"]["engines"],
        options=tensorrt_options(),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/engine.py"
