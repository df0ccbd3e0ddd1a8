"""Undamaged input files of every kind that is read, and the commands that read them, as the command line runs them."""

import base64
import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import sentencepiece
import yaml
from gguf_files import write_gguf
from published_models import (
    BAICHUAN,
    LLAMA,
    META,
    QWEN,
    baichuan_tensors,
    llama_tensors,
    qwen_tensors,
    write_meta,
    write_published,
)
from server import REPOSITORY, Server
from transformers import LlamaConfig
from workflow_config import CONFIG

from trtbuild.checkpoint.dummy import save_byte_tokenizer

DATA = REPOSITORY / "tests" / "data"
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
TINY = LLAMA | SIZES | {"num_key_value_heads": 2, "intermediate_size": 64, "rope_scaling": None}
TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
TEXT = ["the weather is fine today", "a star shines in the night sky", "what is the answer", "春眠不觉晓"] * 50

CALIBRATE = ("--samples", "32", "--length", "16", "--device", "cpu")
LIMITS = ("--max-batch-size", "2", "--max-input-len", "64", "--max-output-len", "8")
CHECKPOINT, ENGINE = ("--checkpoint-dir", "out/checkpoint"), ("--engine-dir", "out/engine")
BUILT = ("--output-dir", "out/engine")
BUILD = ("trtbuild", "build", *CHECKPOINT, *BUILT, "--dtype", "float32", *LIMITS)
ANSWER = ("--json", "--max-output-len", "3", "--input-text", "star")
RUN = ("trtbuild", "run", *ENGINE, "--tokenizer-dir", "out/checkpoint", *ANSWER)
CONVERT = ("trtbuild", "convert", "--output-dir", "out/checkpoint")

# Between them these need every kind of file: calibrations, smoothing factors, each layout of weights.
INT4 = {"dtype": "int4", "group_size": 32}
RECIPES = {
    "gptq": {"dtype": "float32", "weights": INT4 | {"method": "gptq"}},
    "awq": {"dtype": "float32", "weights": INT4 | {"method": "awq"}, "kv_cache": {"dtype": "int8", "per": "head"}},
    "sq": {
        "dtype": "float32",
        "weights": {"dtype": "int8"},
        "activations": {"dtype": "int8", "smoothquant": 0.5},
        "kv_cache": {"dtype": "int8"},
    },
    "fp8": {"dtype": "float32", "weights": {"dtype": "fp8"}, "activations": {"dtype": "fp8"}},
}
PUBLISHED = ("autoawq-gemm", "gptqmodel-asym", "llmcompressor-int4-asym", "llmcompressor-w8a8-static")
WORKFLOW = CONFIG | {
    "matrix": [{"model": "tiny", "recipes": ["fp32"]}],
    "build": CONFIG["build"] | {"max_input_len": 128},
    "evaluation": CONFIG["evaluation"] | {"chat": False},
}


@dataclass(frozen=True)
class Original:
    """A folder of input files, called `in` where the programs run; they write to `out`.

    `layout`: whose names and order the weights have, for the comparison with independent readers.
    """

    name: str
    folder: Path
    programs: tuple[tuple[str, ...], ...]
    layout: str = ""

    @property
    def files(self) -> list[str]:
        """All that can be damaged."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


class Kitchen:
    """Makes the originals in `folder`, and in a folder beside them what commands make for them, run by `server`."""

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.made, self.server = folder, folder / "made", server
        self.originals: list[Original] = []
        (self.made / "tmp").mkdir(parents=True)

    def add(self, name: str, *programs: tuple[str, ...], layout: str = "", files: dict[str, str | Path] = {}) -> None:  # noqa: B006
        """`files`: where in the original's folder, and what is copied there, but for the marker of our folders."""
        for target, source in files.items():
            source, target = self.made / source, self.folder / name / target
            target.parent.mkdir(parents=True, exist_ok=True)
            ignored = shutil.ignore_patterns("made-by-trtbuild", "expected.safetensors")
            copy = shutil.copytree if source.is_dir() else shutil.copy
            copy(source, target, **({"ignore": ignored, "dirs_exist_ok": True} if source.is_dir() else {}))
        self.originals.append(Original(name, self.folder / name, programs, layout))

    def make(self, *command: str) -> str:
        outcome = self.server.run(self.made, *command)
        assert outcome.code == 0, outcome.stderr
        return outcome.stdout


def make_originals(folder: Path, server: Server) -> list[Original]:
    kitchen = Kitchen(folder, server)
    for add in (checkpoints, quantized, engines, results, workflow):
        add(kitchen)
    return kitchen.originals


def checkpoints(kitchen: Kitchen) -> None:
    """Models as they are published: to a checkpoint, an engine and an answer."""
    folder = kitchen.folder
    local = (*CONVERT, "--local", "in")
    chain = (local, BUILD, RUN)
    chat = (local, BUILD, (*RUN, "--chat"))
    tensors = llama_tensors(TINY)
    for name, options, programs in (
        ("llama", {"safetensors": True, "tokenizer": talking}, chat),
        ("llama-shards", {"safetensors": True, "shards": 2}, chain),
        ("llama-bin", {}, chain),
        ("llama-bin-shards", {"shards": 2}, chain),
    ):
        write_published(folder / name, TINY, tensors, **options)
        kitchen.add(name, *programs, layout="llama")
    params = META | {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 32}
    train_sentencepiece(write_meta(folder / "meta", params, llama_tensors(TINY | {"intermediate_size": 96})))
    kitchen.add("meta", *chain, layout="meta")
    config = QWEN | SIZES | {"num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 480}
    write_published(folder / "qwen", config, qwen_tensors(config), safetensors=True, tokenizer=write_tiktoken)
    kitchen.add("qwen", local, BUILD, (*RUN, "--chat", "--chat-template", "qwen"), layout="published")
    config = BAICHUAN | SIZES | {"intermediate_size": 64, "model_max_length": 512}
    write_published(folder / "baichuan", config, baichuan_tensors(config), tokenizer=train_sentencepiece)
    kitchen.add("baichuan", (*local, "--model-version", "v1_13b"), BUILD, RUN, layout="published")
    arrays = {name: x.numpy() for name, x in llama_tensors(TINY | {"vocab_size": 260}).items()}
    for name, kind in (("gguf", gguf.GGMLQuantizationType.F32), ("gguf-q8", gguf.GGMLQuantizationType.Q8_0)):
        (folder / name).mkdir()
        write_gguf(folder / name / "model.gguf", LlamaConfig(**TINY | {"vocab_size": 260}), arrays, kind)
        kitchen.add(name, (*CONVERT, "--gguf", "in/model.gguf"), BUILD, RUN, layout="gguf")
    (folder / "dummy").mkdir()
    models = {"tiny": {"source": {"local": {"path": "nowhere"}}, "config": TINY, "chat_template": "chatml"}}
    (folder / "dummy" / "models.yaml").write_text(yaml.safe_dump(models))
    kitchen.add("dummy", (*CONVERT, "--dummy", "tiny", "--models", "in/models.yaml"), BUILD, RUN)


def talking(folder: Path) -> None:
    """A tokenizer with all files that may lie beside one."""
    save_byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 2], "bos_token_id": 0}))
    tokens = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))


def train_sentencepiece(folder: Path) -> None:
    model = io.BytesIO()
    options = {"model_type": "bpe", "vocab_size": 312, "byte_fallback": True, "normalization_rule_name": "identity"}
    options |= {"user_defined_symbols": ["<reserved_102>", "<reserved_103>"], "num_threads": 1, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(TEXT), model_writer=model, **options)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "add_eos_token": False}))
    (folder / "added_tokens.json").write_text(json.dumps({"<s>": 1}))


def write_tiktoken(folder: Path) -> None:
    tokens = [*(bytes([i]) for i in range(256)), b"th", b"the", b"st", b"ar", b"star", b" the", "春".encode()[:2]]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))


def quantized(kitchen: Kitchen) -> None:
    """Calibrations, recipes and what is made of both; quantized weights, ours and others'."""
    kitchen.make("trtbuild", "convert", "--local", "../llama", "--output-dir", "checkpoint")
    kitchen.make("trtbuild", "calibrate", "--checkpoint-dir", "checkpoint", "--output", "calibration.npz", *CALIBRATE)
    small = {"calibration": {"samples": 32, "length": 16}}
    (kitchen.made / "recipes.yaml").write_text(yaml.safe_dump({name: part | small for name, part in RECIPES.items()}))
    for name, recipe in RECIPES.items():
        options = ("--recipes", "in/recipes.yaml", "--recipe", name)
        ranges = ("--calibration", "in/calibration.npz")
        measured = ranges if "activations" in recipe else ()
        quantize = ("trtbuild", "quantize", "--checkpoint-dir", "in/checkpoint", *options, *measured)
        quantize += ("--output-dir", "out/checkpoint")
        build = ("trtbuild", "build", *options, *(ranges if "kv_cache" in recipe else ()), *BUILT, *LIMITS)
        build += CHECKPOINT
        read = ("checkpoint", "recipes.yaml", *(["calibration.npz"] if measured or "kv_cache" in recipe else []))
        files = {file: file for file in read}
        kitchen.add(f"quantize-{name}", quantize, build, RUN, files=files)
        kitchen.make(*(word.replace("in/", "").replace("out/checkpoint", name) for word in quantize))
        from_there = (tuple(word.replace("out/checkpoint", "in/checkpoint") for word in step) for step in (build, RUN))
        if "kv_cache" not in recipe:
            files.pop("calibration.npz", None)
        kitchen.add(f"build-{name}", *from_there, files=files | {"checkpoint": name})
    for fixture in PUBLISHED:
        kitchen.add(fixture, (*CONVERT, "--local", "in"), BUILD, RUN, files={"": DATA / fixture})
        save_byte_tokenizer(kitchen.folder / fixture)


def engines(kitchen: Kitchen) -> None:
    """Engine folders and prompts; what the Hugging Face baseline reads."""
    kitchen.make(*(word.replace("out/", "") for word in BUILD))
    (kitchen.made / "prompts.txt").write_text("a star\nThe weather, 天气\n", encoding="utf-8")
    engine = ("--engine-dir", "in/engine")
    run = ("trtbuild", "run", *engine, "--tokenizer-dir", "in/checkpoint", "--input-file", "in/prompts.txt")
    inspect = ("trtbuild", "inspect", *engine, "--nodes")
    files = {file: file for file in ("checkpoint", "engine", "prompts.txt")}
    kitchen.add("engine", (*run, "--json", "--max-output-len", "3"), inspect, files=files)
    np.save(kitchen.made / "prompts.npy", np.array([[5, 6, 7], [8, 2, 2]], dtype=np.int32))
    (kitchen.made / "prompts.csv").write_text("5,6,7\n8, 9\n")
    (kitchen.made / "prompts.jsonl").write_text('{"text": "a star"}\n{"prompt": "x"}\n{"input_ids": [5, 6]}\n')
    for kind in ("npy", "csv", "jsonl"):
        outputs = ("--output-csv", "out/rows.csv", "--output-npy", "out/rows.npy", "--num-beams", "2")
        command = (*run[:-1], f"in/prompts.{kind}", *outputs, "--max-output-len", "3")
        kitchen.add(f"prompts-{kind}", command, files={f: f for f in ("checkpoint", "engine", f"prompts.{kind}")})
    perplexity = ("trtbuild", "perplexity", "--checkpoint-dir", "in/checkpoint", "--samples", "1")
    kitchen.add("baseline", (*perplexity, "--max-input-len", "500"), files={"checkpoint": "checkpoint"})


def rule(name: str, **parts: dict) -> tuple[str, str]:
    return name, json.dumps(parts)


def results(kitchen: Kitchen) -> None:
    """Our own result files, as commands and rules read them."""
    checkpoint, sizes = ("--checkpoint-dir", "checkpoint"), ("--samples", "2", "--max-input-len", "64")
    engine = ("--engine-dir", "engine")
    for side, weights in (("", engine), ("-hf", ())):
        files = {"summaries": f"summaries{side}.jsonl", "rouge": f"rouge{side}.json"}
        length = ("--max-output-len", "8")
        kitchen.make("trtbuild", "summarize", *checkpoint, *weights, *sizes, *length, "--output", files["summaries"])
        kitchen.make("trtbuild", "score", "--summaries", files["summaries"], "--output", files["rouge"])
        kitchen.make("trtbuild", "perplexity", *checkpoint, *weights, *sizes, "--output", f"perplexity{side}.json")
    score = ("trtbuild", "score", "--summaries", "in/summaries.jsonl", "--baseline", "in/rouge.json")
    summaries = {file: file for file in ("summaries.jsonl", "summaries.meta.json")}
    kitchen.add("score", (*score, "--output", "out/rouge.json"), files=summaries | {"rouge.json": "rouge.json"})

    limits = {"limits": {"max_increase": 1e9, "policy": "fail"}}
    perplexities = {"perplexity": "in/perplexity.json", "baseline": "in/perplexity-hf.json"}
    gate = rule("gate", input=perplexities, output={"gate": "out/gate.json"}, params=limits)
    scored = {"summaries": "in/summaries.jsonl", "gate": "out/gate.json"}
    rouge = rule("rouge", input=scored, output={"rouge": "out/rouge.json"})
    measured = {file: file for file in ("perplexity.json", "perplexity-hf.json")}
    kitchen.add("gate", gate, rouge, files=summaries | measured)
    kitchen.make(*(word.replace("in/", "").replace("out/", "") for word in gate))
    rouge = rule("rouge", input=scored | {"gate": "in/gate.json"}, output={"rouge": "out/rouge.json"})
    kitchen.add("gated", rouge, files=summaries | {"gate.json": "gate.json"})

    (kitchen.made / "time.tsv").write_text("s\th:m:s\n1.5\t0:00:01\n")
    where, runs = {"model": "/proc/self/cwd/in"}, {"runs": {"fp32": {"weights": "checkpoint"}}}
    files = {f"{run}/{name}.json": f"{name}{side}.json" for run, side in (("hf", "-hf"), ("fp32", ""))
             for name in ("perplexity", "rouge")}  # fmt: skip
    files |= {"fp32/engine": "engine", "fp32/logs/portable_engine.rank0.tsv": "time.tsv"}
    data = {"data": "out/recipes.json"}
    recipes = rule("recipes", wildcards=where, params=runs, output=data)
    table, page = (rule(name, input=data, output={name: f"out/{name}"}) for name in ("table", "page"))
    kitchen.add("table", recipes, table, page, files=files)


def workflow(kitchen: Kitchen) -> None:
    """The workflow's configuration."""
    folder = kitchen.folder / "workflow" / "config"
    folder.mkdir(parents=True)
    models = {"tiny": {"source": {"dummy": {"config": TINY, "seed": 1}}, "chat_template": "chatml"}}
    parts = {"config": WORKFLOW, "models": models, "recipes": RECIPES | {"fp32": {"dtype": "float32"}}}
    for name, part in parts.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(part))
    snakefile = ("snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--directory", "in")
    kitchen.add("workflow", (*snakefile, "--dry-run", "--cores", "1", "--quiet", "all"))
