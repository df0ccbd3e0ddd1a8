# Checkpoint, and ranges where activations are quantized -> a folder of quantized weights, shared by recipes.


rule quantize:
    input:
        checkpoint="results/{model}/checkpoint",
        calibration=ranges_of_quantization,
    output:
        directory("results/{model}/quantized/{quantization}"),
    log:
        "results/{model}/logs/quantize.{quantization}.log",
    benchmark:
        "results/{model}/logs/quantize.{quantization}.tsv"
    params:
        quantization=settings_of_quantization,
        source=lambda wildcards: QUANTIZATIONS[wildcards.quantization].get("source"),
        files=state_of_quantization,
    threads: THREADS
    resources:
        gpu=gpus_for(1),
        **needs(
            lambda model, wildcards: needs_of.quantization(
                model, QUANTIZATIONS[wildcards.quantization].get("quantization"), DEVICE
            )
        ),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/quantize.py"
