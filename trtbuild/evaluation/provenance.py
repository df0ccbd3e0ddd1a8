"""What produced a result, and what it was asked; results that differ in the latter are not compared."""

from collections.abc import Sequence
from dataclasses import astuple
from importlib.metadata import PackageNotFoundError, version

import torch

import trtbuild
from trtbuild.datasets import Article
from trtbuild.errors import UserError
from trtbuild.files import sha256_of
from trtbuild.layout import layout_name
from trtbuild.runtime.open import OpenedEngine

# What two results must have in common, and its name; the token ids also depend on the tokenizer and its chat template.
SAME = {
    "source_sha256": "the original model (source_sha256)",
    "dataset": "dataset",
    "articles_sha256": "the text of the articles (articles_sha256)",
    "prompt": "prompt",
    "chat": "chat",
    "max_input_len": "max_input_len",
    "max_output_len": "max_output_len",
    "tokens_sha256": "what tokenizer and chat template made of the text (tokens_sha256)",
    "samples": "the number of texts",
    "tokenizer": "ROUGE's tokenizer",
}


def provenance(opened: OpenedEngine) -> dict:
    """Engine kind, recipe, ranks, sha256 of the engine and of the model that it comes from, device and versions."""
    mapping = opened.config["mapping"]
    layout = layout_name(mapping["tp_size"], mapping["pp_size"])
    return {
        "engine": opened.session.kind,
        "model": opened.config["model"],
        **({"recipe": opened.config["recipe_name"]} if "recipe_name" in opened.config else {}),
        "options": opened.config["recipe"],
        "dtype": opened.dtype,
        **({"layout": layout} if layout else {}),
        "engine_sha256": opened.sha256,
        "source_sha256": opened.config.get("source_sha256"),
        **environment(opened.session.device),
    }


def settings(dataset: dict, articles: list[Article], tokens: list[list[int]], **options: object) -> dict:
    """What a result was asked: the data set and what of it was read, the token ids given to the model, options."""
    return {
        "dataset": {key: value for key, value in dataset.items() if value is not None},
        "samples": len(articles),
        "articles_sha256": sha256_of([astuple(article) for article in articles]),
        "tokens_sha256": sha256_of(tokens),
        **options,
        "seed": 0,
    }


def label(result: dict) -> str:
    """What a result is of, in few words: `portable int8kv@tp2`, `transformers float32`."""
    origin = result["provenance"]
    run = "@".join(str(part) for part in (origin.get("recipe", origin["dtype"]), origin.get("layout")) if part)
    return f"{origin['engine']} {run}{' (rehearsal)' if 'rehearsal' in result else ''}"


def refuse_different(results: Sequence[dict]) -> None:
    """Raises `UserError` unless results of one kind are of one original model, and were asked and scored alike."""
    first, *others = results
    for other in others:
        ours, theirs = _asked(first), _asked(other)
        for key, name in SAME.items():
            if ours.get(key) != theirs.get(key):
                a, b = (str(side.get(key))[: 12 if key.endswith("sha256") else None] for side in (ours, theirs))
                raise UserError(f"the results are not comparable: {name} is {a} and {b}")


def _asked(result: dict) -> dict:
    origin = result.get("provenance")
    if not isinstance(origin, dict) or not origin.get("source_sha256"):
        raise UserError("a result does not tell which model it is of (provenance.source_sha256); make it again")
    return origin | {key: result[key] for key in ("samples", "tokenizer") if key in result}


def environment(device: torch.device) -> dict:
    """Device, threads and versions of what computes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads(), "versions": _versions()}


def _versions() -> dict[str, str]:
    found = {"trtbuild": trtbuild.__version__}
    for package in ("torch", "transformers", "tensorrt_rtx_cu13", "tensorrt", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
