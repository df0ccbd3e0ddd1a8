"""The evaluation stages as the workflow's rules and the command line call them."""

from collections.abc import Callable
from pathlib import Path

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.datasets import load_articles
from trtbuild.decoder.decoder import cache_of_network
from trtbuild.decoder.mapping import Mapping
from trtbuild.decoder.sharding import joined_cache
from trtbuild.engine.config import marker, rank_file, read_config
from trtbuild.engine.portable import read_portable
from trtbuild.errors import UserError
from trtbuild.evaluation.baseline import missing_in_transformers, open_baseline
from trtbuild.evaluation.benchmark import benchmark, by_engine, compare, heading, random_prompts
from trtbuild.evaluation.divergence import Divergence, OutputProduct, write_hidden_states
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.evaluation.perplexity import perplexity
from trtbuild.evaluation.profile import write_profile
from trtbuild.evaluation.provenance import label, provenance, refuse_different, settings
from trtbuild.evaluation.rouge import METRICS, TOKENIZER, check_references, difference, score
from trtbuild.evaluation.summarization import read_summaries, summarization_prompts, write_summaries
from trtbuild.evaluation.verify import TOLERANCE, Agreement, verify
from trtbuild.progress import OutputBar
from trtbuild.runtime.generation import OnOutput, Output, generate
from trtbuild.runtime.open import open_engine
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.tokenizer.tokenizer import Tokenizer

VERIFY_PROMPTS = ("The capital of France is", "Water", "In 1969, for the first time, a person stood on the Moon, and")


def summarize_articles(
    *,
    output: Path,
    checkpoint_dir: Path,
    engine_dir: Path | None = None,
    dataset: dict,
    prompt: str,
    chat: bool,
    chat_template: str | None = None,
    max_output_len: int,
    max_input_len: int = 0,
    baseline_dtype: str = "float32",
    runtime: str = "auto",
    device: str = "auto",
    check: bool = False,
    model: str | None = None,
) -> None:
    """Writes the summaries of a data set by an engine, or without `engine_dir` by the baseline, Hugging Face's model.

    `checkpoint_dir` gives the tokenizer, and the Hugging Face model. An engine brings its own `max_input_len`.
    `chat_template`: the text of one, in place of the tokenizer's own. `check`: as `open_engine` takes it.
    """
    articles = load_articles(**dataset)
    check_references([article.highlights for article in articles])
    tokenizer = Tokenizer(checkpoint_dir, chat_template)
    params = SamplingParams(max_output_len, eos_token_ids=tokenizer.eos_token_ids)
    if engine_dir:
        opened = open_engine(engine_dir, runtime, device, check)
        max_input_len = opened.session.limits.max_input_len
        run = _with_bar(lambda prompts, **watch: generate(opened.session, prompts, params, **watch), max_output_len)
        origin = provenance(opened)
    else:
        baseline = open_baseline(checkpoint_dir, baseline_dtype, device, None, max_input_len, max_output_len)
        run = _with_bar(lambda prompts, **watch: baseline.generate(prompts, params, **watch), max_output_len)
        origin = baseline.provenance(model or checkpoint_dir.resolve().name)
    prompts = summarization_prompts(articles, tokenizer, prompt, chat, max_input_len)
    limits = {"max_input_len": max_input_len, "max_output_len": max_output_len}
    origin |= settings(dataset, articles, prompts, prompt=prompt, chat=chat, **limits)
    write_summaries(output, articles, tokenizer, prompts, run, origin | marker(origin["model"]))


def _with_bar(run: Callable[..., list[Output]], longest: int) -> Callable[[list[list[int]], OnOutput], list[Output]]:
    def call(prompts: list[list[int]], on_output: OnOutput) -> list[Output]:
        with OutputBar([*map(len, prompts)], longest, "summaries", "article") as bar:

            def ended(index: int, output: Output) -> None:
                bar.output(index)
                on_output(index, output)

            return run(prompts, on_token=lambda index, token: bar.token(index), on_output=ended, say=bar.say)

    return call


def score_summaries(path: Path, seed: int = 0) -> dict:
    """ROUGE of a summaries file, with its provenance."""
    records, origin = read_summaries(path)
    scores = score([r["summary"] for r in records], [r["reference"] for r in records], seed)
    marked = marker(origin.get("model", ""))
    scored = {"samples": len(records), "tokenizer": TOKENIZER, "bootstrap_seed": seed}
    return scores | scored | {"provenance": origin} | marked


def rouge_table(results: list[dict]) -> str:
    """Scores side by side, a line an engine; of two also their difference, article by article.

    Raises `UserError` for those that are not comparable.
    """
    lines = [f"{'':34}" + "".join(f"{metric:>24}" for metric in METRICS)]
    for result in results:
        cells = (f"{m['mean']:.2f} [{m['low']:.2f}, {m['high']:.2f}]" for m in (result[metric] for metric in METRICS))
        lines.append(f"{label(result):34}" + "".join(f"{cell:>24}" for cell in cells))
    refuse_different(results)
    if len(results) == 2 and (differences := difference(results[0], results[1])):
        cells = (f"{d['mean']:+z.2f} [{d['low']:+z.2f}, {d['high']:+z.2f}]" for d in differences.values())
        lines.append(f"{'difference':34}" + "".join(f"{cell:>24}" for cell in cells))
    return "\n".join(lines)


def beside(ours: Path, theirs: Path, results: list[dict]) -> str:
    """Two models' summaries of the same articles, one after the other in Markdown, with their scores (`results`).

    Raises `UserError` for summaries that are not comparable.
    """
    sides = [(read_summaries(path)[0], result) for path, result in zip((ours, theirs), results, strict=True)]
    lines = ["# Summaries side by side", "", "```", rouge_table(results), "```"]
    for i, record in enumerate(sides[0][0]):
        texts = [("Reference", record["reference"])]
        for records, result in sides:
            texts.append((f"{label(result)}, ROUGE-1 {result['rouge1']['articles'][i]:.2f}", records[i]["summary"]))
        lines += ["", f"## {record.get('id', i)}"]
        for name, text in texts:
            lines += ["", f"**{name}**", "", *(f"> {line}" for line in text.split("\n"))]
    return "\n".join(lines) + "\n"


def measure_perplexity(
    *,
    checkpoint_dir: Path,
    engine_dir: Path | None = None,
    dataset: dict,
    max_input_len: int = 0,
    baseline_dtype: str = "float32",
    runtime: str = "auto",
    device: str = "auto",
    check: bool = False,
    model: str | None = None,
    hidden_states: Path | None = None,
) -> dict:
    """Perplexity of a data set's articles under an engine, or without `engine_dir` under the Hugging Face model.

    `hidden_states`: a file that the Hugging Face model writes, and with which an engine's distributions are compared
    (`divergence`); `checkpoint_dir` is then the original one.
    """
    tokenizer = Tokenizer(checkpoint_dir)
    articles = load_articles(**dataset)
    texts = [tokenizer.encode(article.article) for article in articles]
    asked = settings(dataset, articles, texts, max_input_len=max_input_len)
    if engine_dir:
        opened = open_engine(engine_dir, runtime, device, check)
        session = opened.session
        asked["max_input_len"] = session.limits.max_input_len
        origin = provenance(opened) | asked
        logits = lambda ids: session.prefill([ids], all_logits=True)
        with torch.inference_mode():
            if not hidden_states:
                result = perplexity(texts, logits, session.limits.max_input_len)
            else:
                divergence = Divergence(hidden_states, Checkpoint(checkpoint_dir), session.device, origin)
                result = perplexity(texts, logits, session.limits.max_input_len, divergence.add)
                result["divergence"] = divergence.result()
    else:
        baseline = open_baseline(checkpoint_dir, baseline_dtype, device, None, max_input_len)
        origin = baseline.provenance(model or checkpoint_dir.resolve().name) | asked
        product = OutputProduct(baseline.checkpoint, getattr(torch, baseline_dtype), baseline.device)
        states: list[torch.Tensor] = []

        def logits_of(ids: list[int]) -> torch.Tensor:
            hidden = baseline.hidden_states(ids)
            if hidden_states:
                states.append(hidden[:-1].cpu())
            return product(hidden)

        with torch.inference_mode():
            result = perplexity(texts, logits_of, max_input_len)
        if hidden_states:
            write_hidden_states(hidden_states, states, product, origin)
    return result | {"provenance": origin} | marker(origin["model"])


def run_benchmark(
    engine_dir: Path,
    batch_size: int,
    input_len: int,
    output_len: int,
    repeats: int,
    runtime: str = "auto",
    device: str = "auto",
    check: bool = False,
    profile: Path | None = None,
    transformers: Path | None = None,
) -> dict:
    """Speed of an engine, with provenance.

    `profile`: a folder for traces and a page of where the time goes. `transformers`: a checkpoint, whose Hugging Face
    model is timed beside the engine, in float16 on a GPU and in the engine's dtype on a CPU. Raises `UserError` where
    `transformers` has no such model, before anything is timed.
    """
    if transformers:
        missing = missing_in_transformers(Checkpoint(transformers).config, input_len, output_len)
        if missing:
            raise UserError(f"transformers has no {missing}, which {transformers} needs; leave --compare out")
    opened = open_engine(engine_dir, runtime, device, check)
    session = opened.session
    result = benchmark(session, batch_size, input_len, output_len, repeats)
    origin = provenance(opened) | {"samples": repeats, "seed": 0}
    result |= {"provenance": origin} | marker(origin["model"])
    if profile:
        write_profile(by_engine(session, random_prompts(batch_size, input_len)), profile, heading(result), output_len)
    if transformers:
        dtype = "float16" if session.device.type == "cuda" else opened.dtype
        result = compare(result, HuggingFaceModel(transformers, dtype, session.device.type), repeats)
    return result


def verify_engine(
    engine_dir: Path,
    checkpoint_dir: Path,
    texts: list[str] | None,
    max_output_len: int,
    runtimes: list[str] | None = None,
) -> list[Agreement]:
    """Compares every runtime of an engine folder with the baseline in float32, on the same prompts.

    Its files are checked down to the last byte.
    """
    from trtbuild.engine.tensorrt_api import api, runs_here

    if max_output_len < 1:
        raise UserError(f"max_output_len is {max_output_len}; it must be at least 1")
    config = read_config(Path(engine_dir), check=True)
    checkpoint, mapping = Checkpoint(checkpoint_dir), Mapping(**config["mapping"])
    if not checkpoint.hashes.items() <= config["inputs"].items():
        raise UserError(
            f"{engine_dir} was not built from {checkpoint_dir}; give the checkpoint that it was built from, which for "
            "quantized weights is the quantized one"
        )
    if runtimes is None and mapping.world_size > 1:
        runtimes = ["portable"]
    elif runtimes is None:
        runtimes = ["portable"]
        try:
            api()
            runtimes = ["interpreted", "portable"]
        except UserError as error:
            print(f"the TensorRT network is not compared: {error}")
        builder = config["builders"].get("tensorrt")
        if builder and runs_here(builder):
            runtimes.append("tensorrt")
    tokenizer = Tokenizer(checkpoint_dir)
    prompts = [tokenizer.encode(text) for text in texts or VERIFY_PROMPTS]
    files = [Path(engine_dir) / rank_file(own.rank, "portable") for own in mapping.ranks]
    caches = [cache_of_network(read_portable(file)[0]) for file in files]
    cache = joined_cache(caches, checkpoint.config.num_key_value_heads, mapping)
    longest = max(1, *map(len, prompts))  # an empty prompt is refused below
    baseline = open_baseline(checkpoint_dir, "float32", "auto", cache, longest, max_output_len)
    names = {
        "interpreted": "TensorRT network, interpreted",
        "portable": "portable engine",
        "tensorrt": "TensorRT engine",
    }
    agreements = []
    for runtime in runtimes:
        opened = open_engine(engine_dir, runtime)
        name = f"{names.get(runtime, runtime)} ({opened.dtype})"
        agreements.append(verify(name, opened.session, TOLERANCE[opened.dtype], baseline, prompts, max_output_len))
    return agreements
