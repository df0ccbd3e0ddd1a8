# Checkpoint -> ranges of activations, keys and values; once a model and calibration setting.


rule calibration:
    input:
        lambda wildcards: (
            f"results/{wildcards.model}/{CALIBRATIONS[wildcards.calibration]['weights'] or 'checkpoint'}"
        ),
    output:
        "results/{model}/calibration/{calibration}.npz",
    log:
        "results/{model}/logs/calibration.{calibration}.log",
    benchmark:
        "results/{model}/logs/calibration.{calibration}.tsv"
    params:
        settings=lambda wildcards: CALIBRATIONS[wildcards.calibration]["settings"],
        articles=lambda wildcards: articles_state(**CALIBRATIONS[wildcards.calibration]["settings"]["dataset"]),
    threads: THREADS
    resources:
        gpu=gpus_for(1),
        **needs(lambda model, wildcards: needs_of.calibration(model, text_of_calibration(wildcards), DEVICE)),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/calibration.py"
