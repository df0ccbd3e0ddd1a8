"""What engines are worth: summaries and their scores, perplexity and its gate, speed."""

import json
from pathlib import Path
from typing import Annotated

import typer

from trtbuild.cli.config import Config, template_of
from trtbuild.cli.options import (
    MODELS,
    RECIPE,
    BaselineDtype,
    BaselineEngineDir,
    ChatTemplate,
    Check,
    CheckpointDir,
    Dataset,
    DatasetConfig,
    DatasetRevision,
    Device,
    DeviceOption,
    Dtype,
    EngineDir,
    Models,
    Peer,
    Recipes,
    Runtime,
    RuntimeOption,
    Samples,
    Split,
    dataset_of,
    recipe_of,
    writable,
)
from trtbuild.engine.config import read_config
from trtbuild.errors import UserError


def summarize(
    checkpoint_dir: CheckpointDir,
    output: Annotated[
        Path, typer.Option(help="JSON lines to write; provenance goes beside it as .meta.json.", callback=writable)
    ],
    engine_dir: BaselineEngineDir = None,
    baseline_dtype: BaselineDtype = Dtype.float32,
    dataset: Dataset = "trtbuild-news",
    dataset_config: DatasetConfig = None,
    dataset_revision: DatasetRevision = None,
    split: Split = "evaluation",
    samples: Samples = 16,
    prompt: Annotated[str, typer.Option(help="Template with {article}.")] = "{article}\n\nTL;DR:",
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="Send the prompt through a chat template.")] = False,
    chat_template: ChatTemplate = None,
    models: Models = MODELS,
    max_input_len: Annotated[
        int, typer.Option(help="Hugging Face model: articles are cut to fit; an engine has its own.")
    ] = 1024,
    max_output_len: Annotated[int, typer.Option(help="Tokens of a summary at most.")] = 100,
    runtime: RuntimeOption = Runtime.auto,
    device: DeviceOption = Device.auto,
    check: Check = False,
    config: Config = None,
) -> None:
    """Summarize articles with an engine or the Hugging Face model.

    Example: trtbuild summarize --engine-dir engine --checkpoint-dir checkpoint --chat --output summaries.jsonl

    As the workflow does: trtbuild summarize --config config/config.yaml --engine-dir results/qwen7b-chat/int8kv/engine
    --checkpoint-dir results/qwen7b-chat/checkpoint --output summaries.jsonl
    """
    from trtbuild.evaluation.stages import summarize_articles
    from trtbuild.tokenizer.chat_template import read as read_template

    if chat_template and not chat:
        raise UserError("--chat-template is for a chat; add --chat, or leave it out")
    if config and chat and not chat_template:
        name = read_config(engine_dir)["model"] if engine_dir else checkpoint_dir.resolve().parent.name
        chat_template = template_of(name, models)
    summarize_articles(
        output=output,
        engine_dir=engine_dir,
        checkpoint_dir=checkpoint_dir,
        baseline_dtype=baseline_dtype.value,
        dataset=dataset_of(dataset, dataset_config, dataset_revision, split) | {"samples": samples},
        prompt=prompt,
        chat=chat,
        chat_template=read_template(chat_template) if chat_template else None,
        max_input_len=max_input_len,
        max_output_len=max_output_len,
        runtime=runtime.value,
        device=device.value,
        check=check,
    )


def score(
    summaries: Annotated[Path, typer.Option(help="File written by 'summarize'.")],
    output: Annotated[
        Path | None, typer.Option(help="Where rouge.json goes; default: print it.", callback=writable)
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Another rouge.json of the same model, articles and prompt, for a table of both; or summaries."
        ),
    ] = None,
    side_by_side: Annotated[
        Path | None,
        typer.Option(help="Markdown with each article's summaries; --baseline gives the others.", callback=writable),
    ] = None,
    check_accuracy: Annotated[
        bool, typer.Option("--check-accuracy", help="Exit 2 where ROUGE-1 is below --rouge1-threshold.")
    ] = False,
    rouge1_threshold: Annotated[float, typer.Option(help="Per cent.")] = 15.0,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """ROUGE of summaries: mean F1 in per cent, with 95% intervals.

    Example: trtbuild score --summaries summaries.jsonl --output rouge.json

    Beside the original: trtbuild score --summaries int8kv/summaries.jsonl --baseline hf/summaries.jsonl --side-by-side
    both.md --check-accuracy
    """
    from trtbuild.evaluation.rouge import SHAPE
    from trtbuild.evaluation.stages import beside, rouge_table, score_summaries
    from trtbuild.files import atomic, read_json, write_json

    if side_by_side and (baseline is None or baseline.suffix != ".jsonl"):
        raise UserError("--side-by-side shows two models' summaries; give the others as --baseline SUMMARIES.jsonl")
    result = score_summaries(summaries, seed)
    results = [result]
    if baseline:
        results.append(score_summaries(baseline) if baseline.suffix == ".jsonl" else read_json(baseline, SHAPE))
    table = rouge_table(results)
    if output:
        write_json(output, result)
    if side_by_side and baseline:
        with atomic(side_by_side) as temporary:
            temporary.write_text(beside(summaries, baseline, results), encoding="utf-8")
    if output or baseline or check_accuracy:
        print(table)
    else:
        print(json.dumps(result, indent=2, allow_nan=False))
    if check_accuracy and result["rouge1"]["mean"] < rouge1_threshold:
        raise UserError(
            f"{summaries}: ROUGE-1 is {result['rouge1']['mean']:.2f}, below the {rouge1_threshold:g} allowed"
        )


def perplexity(
    checkpoint_dir: CheckpointDir,
    engine_dir: BaselineEngineDir = None,
    baseline_dtype: BaselineDtype = Dtype.float32,
    dataset: Dataset = "trtbuild-news",
    dataset_config: DatasetConfig = None,
    dataset_revision: DatasetRevision = None,
    split: Split = "evaluation",
    samples: Samples = 16,
    max_input_len: Annotated[int, typer.Option(help="Window of the Hugging Face model; an engine has its own.")] = 1024,
    save_hidden_states: Annotated[
        Path | None,
        typer.Option(help="Where the Hugging Face model's hidden states go, for --hidden-states.", callback=writable),
    ] = None,
    hidden_states: Annotated[
        Path | None,
        typer.Option(
            help="Those: how far an engine's distributions are from the Hugging Face model's (KL divergence)."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the JSON goes; default: print it.", callback=writable)
    ] = None,
    runtime: RuntimeOption = Runtime.auto,
    device: DeviceOption = Device.auto,
    check: Check = False,
    config: Config = None,
) -> None:
    """Perplexity of articles by an engine or the Hugging Face model.

    Example: trtbuild perplexity --engine-dir engine --checkpoint-dir checkpoint

    How far an engine is from the original: trtbuild perplexity --checkpoint-dir checkpoint --save-hidden-states
    hf.safetensors, then trtbuild perplexity --checkpoint-dir checkpoint --engine-dir engine --hidden-states
    hf.safetensors
    """
    from trtbuild.evaluation.stages import measure_perplexity
    from trtbuild.files import write_json

    if engine_dir and save_hidden_states:
        raise UserError("--save-hidden-states is of the Hugging Face model; leave out --engine-dir")
    if hidden_states and not engine_dir:
        raise UserError("--hidden-states is what an engine is compared with; give --engine-dir")
    result = measure_perplexity(
        engine_dir=engine_dir,
        checkpoint_dir=checkpoint_dir,
        baseline_dtype=baseline_dtype.value,
        dataset=dataset_of(dataset, dataset_config, dataset_revision, split) | {"samples": samples},
        max_input_len=max_input_len,
        runtime=runtime.value,
        device=device.value,
        check=check,
        hidden_states=save_hidden_states or hidden_states,
    )
    write_json(output, result) if output else print(json.dumps(result, indent=2, allow_nan=False))


def lm_eval(
    checkpoint_dir: CheckpointDir,
    task: Annotated[str, typer.Option(help="Name of one of the harness's tasks or groups, such as arc_easy.")],
    engine_dir: BaselineEngineDir = None,
    baseline_dtype: BaselineDtype = Dtype.float32,
    limit: Annotated[int | None, typer.Option(help="Documents of each task, from the first; default: all.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples before a question; default: as the task says.")
    ] = None,
    include: Annotated[
        Path | None, typer.Option(help="Folder of task files of your own; what they name with !function is run.")
    ] = None,
    max_input_len: Annotated[
        int, typer.Option(help="Hugging Face model: together with --max-output-len its window; an engine has its own.")
    ] = 1024,
    max_output_len: Annotated[int, typer.Option(help="And tokens of an answer, where a task does not say.")] = 128,
    output: Annotated[
        Path | None, typer.Option(help="Where the JSON goes; default: print it.", callback=writable)
    ] = None,
    runtime: RuntimeOption = Runtime.auto,
    device: DeviceOption = Device.auto,
    check: Check = False,
) -> None:
    """Score an engine on a task of lm-evaluation-harness. Or the Hugging Face model. The harness is the extra lm-eval.

    Example: trtbuild lm-eval --engine-dir engine --checkpoint-dir checkpoint --task arc_easy --limit 100 --output
    arc_easy.json
    """
    from trtbuild.evaluation.tasks import measure_task, task_table
    from trtbuild.files import write_json

    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; it must be at least 1")
    result = measure_task(
        task=task,
        checkpoint_dir=checkpoint_dir,
        engine_dir=engine_dir,
        limit=limit,
        num_fewshot=num_fewshot,
        include=str(include) if include else None,
        max_input_len=max_input_len,
        max_output_len=max_output_len,
        baseline_dtype=baseline_dtype.value,
        runtime=runtime.value,
        device=device.value,
        check=check,
    )
    if output:
        write_json(output, result)
        print(task_table(result))
    else:
        print(json.dumps(result, indent=2, allow_nan=False))


def gate(
    perplexity: Annotated[Path, typer.Option(help="An engine's perplexity.json, written by 'perplexity'.")],
    baseline: Annotated[Path, typer.Option(help="The Hugging Face model's, of the same articles.")],
    recipe: Annotated[str | None, RECIPE] = None,
    recipes: Recipes = None,
    max_increase: Annotated[
        float | None, typer.Option(help="Instead of a recipe's: how much higher the perplexity may be, in per cent.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where gate.json goes.", callback=writable)] = None,
) -> None:
    """Judge an engine's perplexity by the Hugging Face model's. Says how sure that is; exit 2 where it stops.

    Example: trtbuild gate --perplexity perplexity.json --baseline hf.json --max-increase 1
    """
    from trtbuild.evaluation.gate import PERPLEXITY, check_gate, gate, verdict
    from trtbuild.files import read_json, write_json

    if (recipe is None) == (max_increase is None):
        raise UserError("give one of --recipe and --max-increase, which say how much higher the perplexity may be")
    if max_increase is not None and not max_increase > -100:
        raise UserError(f"--max-increase is {max_increase:g}; a perplexity cannot fall by 100%")
    limits = recipe_of(recipe, recipes).gate_limits if recipe else {"max_increase": max_increase, "policy": "fail"}
    result = gate(read_json(perplexity, PERPLEXITY), read_json(baseline, PERPLEXITY), **limits)
    if output:
        write_json(output, result)
    check_gate(result, str(perplexity))
    if result["verdict"] == "passed":
        print(verdict(result))


def benchmark(
    engine_dir: EngineDir,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.")] = 1,
    input_len: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 128,
    output_len: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
    repeats: Annotated[int, typer.Option(help="Timed runs after one to warm up.")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object (docs/formats.md).")] = False,
    profile: Annotated[
        Path | None,
        typer.Option(
            help="Folder for profile.md, the time by kind of kernel, and a trace of each phase.", callback=writable
        ),
    ] = None,
    compare: Annotated[
        Peer | None, typer.Option(help="Time this beside the engine, same prompts and steps; needs --checkpoint-dir.")
    ] = None,
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="With --compare: the checkpoint whose Hugging Face model runs.")
    ] = None,
    runtime: RuntimeOption = Runtime.auto,
    device: DeviceOption = Device.auto,
    check: Check = False,
    config: Config = None,
) -> None:
    """Measure speed and memory. First token, time a token, and the floor that reading its bytes sets.

    Example: trtbuild benchmark --engine-dir engine --batch-size 1 --input-len 512 --output-len 64 --json

    Where the time goes: trtbuild benchmark --engine-dir engine --profile profile; the traces open in
    https://ui.perfetto.dev

    Beside the Hugging Face model, in float16 on a GPU: trtbuild benchmark --engine-dir engine --compare transformers
    --checkpoint-dir checkpoint
    """
    from trtbuild.evaluation.benchmark import table
    from trtbuild.evaluation.stages import run_benchmark

    if bool(compare) != bool(checkpoint_dir):
        raise UserError("--compare transformers and --checkpoint-dir go together; give both, or neither")
    result = run_benchmark(
        engine_dir,
        batch_size,
        input_len,
        output_len,
        repeats,
        runtime.value,
        device.value,
        check,
        profile=profile,
        transformers=checkpoint_dir,
    )
    if as_json:
        print(json.dumps(result, allow_nan=False))
        return
    print(table(result))
    if profile:
        print(f"where the time goes: {profile / 'profile.md'}")
