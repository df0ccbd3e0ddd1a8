# Engine, or Hugging Face model -> perplexity -> quality gate; summaries -> ROUGE; speed.


rule summarize:
    input:
        checkpoint="results/{model}/checkpoint",
        engine="results/{model}/{recipe}{layout}/engine/config.json",
    output:
        summaries=shown("results/{model}/{recipe}{layout}/summaries.jsonl", "summaries"),
        meta="results/{model}/{recipe}{layout}/summaries.meta.json",
    log:
        "results/{model}/{recipe}{layout}/logs/summarize.log",
    params:
        ranks=ranks_of,
        options=evaluation("runtime", "device", "dataset", "prompt", "chat", "max_output_len"),
        chat_template=chat_template,
        articles=articles_to_evaluate,
    threads: threads_of
    resources:
        gpu=lambda wildcards: gpus_for(ranks_of(wildcards)),
        cpus_per_task=threads_of_rank,
        tasks=ranks_of,
        tasks_per_gpu=0,
        mpi=launcher_of,
        **needs(lambda model, wildcards: run_needs(model, wildcards, text_of(wildcards), summary_steps(wildcards))),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/summarize.py"


rule summarize_hf:
    input:
        checkpoint="results/{model}/checkpoint",
    output:
        summaries=shown("results/{model}/hf/summaries.jsonl", "summaries"),
        meta="results/{model}/hf/summaries.meta.json",
    log:
        "results/{model}/hf/logs/summarize.log",
    params:
        options=evaluation("baseline_dtype", "device", "dataset", "prompt", "chat", "max_output_len", **baseline_limits()),
        chat_template=chat_template,
        articles=articles_to_evaluate,
    threads: THREADS
    resources:
        gpu=lambda wildcards: gpus_for(ranks_of_model(wildcards)),
        **needs(lambda model, wildcards: baseline_needs(model, wildcards, text_of(wildcards), summary_steps(wildcards))),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/summarize.py"


rule rouge:
    input:
        summaries="results/{model}/{run}/summaries.jsonl",
        meta="results/{model}/{run}/summaries.meta.json",
        gate=gate_of_run,
    output:
        shown("results/{model}/{run}/rouge.json", "ROUGE"),
    log:
        "results/{model}/{run}/logs/rouge.log",
    resources:
        **SHORT,
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/rouge.py"


rule perplexity:
    input:
        checkpoint="results/{model}/checkpoint",
        engine="results/{model}/{recipe}{layout}/engine/config.json",
        hidden_states="results/{model}/hf/hidden_states.safetensors",
    output:
        shown("results/{model}/{recipe}{layout}/perplexity.json", "perplexity"),
    log:
        "results/{model}/{recipe}{layout}/logs/perplexity.log",
    params:
        ranks=ranks_of,
        options=evaluation("runtime", "device", "dataset"),
        articles=articles_to_evaluate,
    threads: threads_of
    resources:
        gpu=lambda wildcards: gpus_for(ranks_of(wildcards)),
        cpus_per_task=threads_of_rank,
        tasks=ranks_of,
        tasks_per_gpu=0,
        mpi=launcher_of,
        **needs(lambda model, wildcards: run_needs(model, wildcards, text_of(wildcards), 0)),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/perplexity.py"


rule perplexity_hf:
    input:
        checkpoint="results/{model}/checkpoint",
    output:
        shown("results/{model}/hf/perplexity.json", "perplexity"),
        hidden_states="results/{model}/hf/hidden_states.safetensors",
    log:
        "results/{model}/hf/logs/perplexity.log",
    params:
        options=evaluation("baseline_dtype", "device", "dataset", **baseline_limits()),
        articles=articles_to_evaluate,
    threads: THREADS
    resources:
        gpu=lambda wildcards: gpus_for(ranks_of_model(wildcards)),
        **needs(lambda model, wildcards: baseline_needs(model, wildcards, text_of(wildcards), 0)),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/perplexity.py"


rule gate:
    input:
        perplexity="results/{model}/{recipe}{layout}/perplexity.json",
        baseline="results/{model}/hf/perplexity.json",
    output:
        shown("results/{model}/{recipe}{layout}/gate.json", "gate"),
    log:
        "results/{model}/{recipe}{layout}/logs/gate.log",
    params:
        limits=lambda wildcards: recipe_of(wildcards).gate_limits,
    resources:
        **SHORT,
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/gate.py"


rule lm_eval:
    input:
        checkpoint="results/{model}/checkpoint",
        engine="results/{model}/{recipe}{layout}/engine/config.json",
        gate="results/{model}/{recipe}{layout}/gate.json",
    output:
        shown("results/{model}/{recipe}{layout}/lm_eval/{task}.json", "{task}"),
    log:
        "results/{model}/{recipe}{layout}/logs/lm_eval.{task}.log",
    params:
        ranks=ranks_of,
        options=task_options("runtime", "device"),
        files=lambda wildcards: trtbuild_workflow.tasks_state(config),
    threads: threads_of
    resources:
        gpu=lambda wildcards: gpus_for(ranks_of(wildcards)),
        cpus_per_task=threads_of_rank,
        tasks=ranks_of,
        tasks_per_gpu=0,
        mpi=launcher_of,
        **needs(lambda model, wildcards: run_needs(model, wildcards, *task_work(wildcards))),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/lm_eval.py"


rule lm_eval_hf:
    input:
        checkpoint="results/{model}/checkpoint",
    output:
        shown("results/{model}/hf/lm_eval/{task}.json", "{task}"),
    log:
        "results/{model}/hf/logs/lm_eval.{task}.log",
    params:
        options=task_options("baseline_dtype", "device", **baseline_lengths()),
        files=lambda wildcards: trtbuild_workflow.tasks_state(config),
    threads: THREADS
    resources:
        gpu=lambda wildcards: gpus_for(ranks_of_model(wildcards)),
        **needs(lambda model, wildcards: baseline_needs(model, wildcards, *task_work(wildcards))),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/lm_eval.py"


# On a CPU, nothing must run beside it either: it takes every core.
rule benchmark:
    input:
        engine="results/{model}/{recipe}{layout}/engine/config.json",
    output:
        shown("results/{model}/{recipe}{layout}/benchmark.json", "speed and memory"),
    log:
        "results/{model}/{recipe}{layout}/logs/benchmark.log",
    params:
        ranks=ranks_of,
        sizes=lambda wildcards: config_of(wildcards)["benchmark"],
        options=evaluation("runtime", "device"),
    threads: threads_of if CLUSTER else workflow.cores
    resources:
        gpu=lambda wildcards: gpus_for(ranks_of(wildcards)),
        cpus_per_task=threads_of_rank,
        tasks=ranks_of,
        tasks_per_gpu=0,
        mpi=launcher_of,
        **needs(benchmark_needs),
    conda:
        "../config/environment.yaml"
    script:
        "../workflow_scripts/benchmark.py"
