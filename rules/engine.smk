# Weights, quantized or not -> one engine file per rank and kind -> config.json.


rule portable_engine:
    input:
        weights=weights_of_recipe,
        cache=ranges_of_cache,
    output:
        "results/{model}/{recipe}{layout}/engine/rank{rank}.safetensors",
    log:
        "results/{model}/{recipe}{layout}/logs/portable_engine.rank{rank}.log",
    benchmark:
        "results/{model}/{recipe}{layout}/logs/portable_engine.rank{rank}.tsv"
    params:
        recipe=lambda wildcards: recipe_of(wildcards).engine_settings,
        limits=build_limits(),
        layout=layout_of,
        extrapolate_positions=config["build"]["extrapolate_positions"],
    threads: 4
    resources:
        **engine_needs(needs_of.portable_engine),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/portable_engine.py"


rule tensorrt_engine:
    input:
        portable="results/{model}/{recipe}{layout}/engine/rank{rank}.safetensors",
    output:
        "results/{model}/{recipe}{layout}/engine/rank{rank}.engine",
    log:
        "results/{model}/{recipe}{layout}/logs/tensorrt_engine.rank{rank}.log",
    benchmark:
        "results/{model}/{recipe}{layout}/logs/tensorrt_engine.rank{rank}.tsv"
    params:
        options=tensorrt_options(),
    threads: 4
    resources:
        **engine_needs(needs_of.tensorrt_engine),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/tensorrt_engine.py"


rule engine:
    input:
        weights=weights_of_recipe,
        cache=ranges_of_cache,
        files=engine_files,
    output:
        "results/{model}/{recipe}{layout}/engine/config.json",
    log:
        "results/{model}/{recipe}{layout}/logs/engine.log",
    params:
        recipe=lambda wildcards: recipe_of(wildcards).engine_settings,
        limits=build_limits(),
        layout=layout_of,
        engines=kinds_of_engine,
        options=lambda wildcards: tensorrt_options(kinds_of_engine(wildcards)),
    resources:
        **engine_needs(needs_of.engine_config),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/engine.py"
