"""What each rule asks of a machine: memory, time and disk, from its model's shapes, its recipe and its rank's share.

Memory is the largest resident set, mapped files included, since some clusters end jobs by that. Each formula says what
a stage holds at a time; beside it stands what it asked for over what was used (tests/workflow/resources_of_rules.py),
on a CPU, with two layers. Time is generous: a bound for the scheduler, and a job that reaches it is lost.
"""

import math
from dataclasses import dataclass
from typing import Literal

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import PAGES_ON_CPU, BuildLimits
from trtbuild.evaluation.plan import cache_of_rank, checkpoint_bytes, constants_of_rank, weights_of_rank
from trtbuild.models.config import ModelConfig
from trtbuild.quantization.recipe import Quantization, Recipe, Text

Device = Literal["cuda", "cpu"]
BASE = 1 << 30  # bytes: Python, torch, transformers
CUDA_BASE = 3 << 30  # more of them where a process uses a GPU: libraries, context, page-locked buffers
MINUTES = 30  # for imports, tokenizers, and file systems that take their time
# Bytes a second of files that are read, hashed or written, and of what TensorRT builds (17e6 on two cores).
FILES, TENSORRT = 5e7, 5e6
# Operations, and bytes of weights in generation steps, a second. Measured: an H100 4.5e13 in GPTQ and 2e12, two cores
# of a CPU 1e11 and 1e10.
COMPUTE = {"cuda": 5e12, "cpu": 2e10}
STEPS = {"cuda": 2e11, "cpu": 2e9}
DOCUMENTS = 20_000  # of a large task: HellaSwag has 10,042, MMLU 14,042
LARGEST_TENSOR = 152064 * 8192 * 4  # of a model that nobody has seen yet: the largest Qwen's embedding, in float32


@dataclass(frozen=True)
class Needs:
    """Bytes of memory and disk, and seconds, beside `BASE` and `MINUTES`."""

    memory: float = 0
    seconds: float = 0
    disk: float = 0

    def resources(self, attempt: int) -> dict[str, int]:
        """As Snakemake names them; an attempt after the first may have failed for want of memory or time."""
        return {
            "mem_mb": math.ceil((BASE + self.memory) * attempt / 1e6),
            "runtime": math.ceil((MINUTES + self.seconds / 60) * attempt),
            "disk_mb": math.ceil(self.disk / 1e6),
        }


# Of a model that nothing describes: its engine is there, its checkpoint was removed.
UNKNOWN = Needs(64e9, 4 * 3600)


def device_of(settings: dict) -> Device:
    """Where the rules compute; `settings` is config/config.yaml, as it holds for the model."""
    return "cpu" if settings["evaluation"]["device"] == "cpu" else "cuda"


def text_of(settings: dict) -> int:
    """About how many tokens all articles have."""
    return settings["evaluation"]["dataset"]["samples"] * max(4096, settings["build"]["max_input_len"])


def summary_steps(settings: dict) -> int:
    """Generation steps of all summaries, one after another."""
    return settings["evaluation"]["dataset"]["samples"] * settings["evaluation"]["max_output_len"]


def task_work(settings: dict) -> tuple[int, int]:
    """Tokens of prompts and generation steps of an accuracy task, which may ask anything: of a large one."""
    documents = settings.get("lm_eval", {}).get("limit", DOCUMENTS)
    return documents * settings["build"]["max_input_len"], documents * settings["build"]["max_output_len"]


def benchmark_work(settings: dict) -> tuple[int, int]:
    """Tokens of prompts and generation steps, ten times over: kernels are compiled, steps captured, and the first ones
    not counted."""
    sizes = settings["benchmark"]
    repeats = 10 * sizes["repeats"]
    return sizes["batch_size"] * sizes["input_len"] * repeats, sizes["output_len"] * repeats


def checkpoint(config: ModelConfig | None, files: int, dtype: str = "float32") -> Needs:
    """One tensor at a time, as published and converted, at most in `dtype`. `files`: bytes of a source that is here.

    SmolLM2-135M 4.2.
    """
    if config is None:
        return Needs(3 * LARGEST_TENSOR, files / FILES, 4 * files)  # 4 bits may become 16
    size = checkpoint_bytes(config, dtype)
    return Needs(3 * _largest(config), 2 * size / FILES, size)


def calibration(config: ModelConfig, text: Text, device: Device) -> Needs:
    """Weights of one layer, and what all samples are at a product. LLaMA-7B 1.5."""
    tokens = text.samples * text.length
    compute = 2 * config.parameters * tokens / COMPUTE[device]
    return Needs(_traversal(config, tokens, device), compute + checkpoint_bytes(config, "float32") / FILES)


def quantization(config: ModelConfig, quantization: Quantization | None, device: Device) -> Needs:
    """To nearest, files that stay mapped and one weight at a time. GPTQ and AWQ traverse the model twice, with a Gram
    matrix a product.

    None: published weights, which are linked or rewritten. To nearest: LLaMA-2 70B 1.2. GPTQ: LLaMA-7B 1.3,
    SmolLM2-135M 3.0.
    """
    size = checkpoint_bytes(config, "float16")
    files = 2 * size / FILES
    if quantization is None or quantization.weights.method == "round":
        return Needs(size + 6 * _largest(config), files, size)
    assert quantization.text
    tokens = quantization.text.samples * quantization.text.length
    gram = config.intermediate_size**2 * 4
    products = 2 * tokens * (3 * config.hidden_size**2 + config.intermediate_size**2) * config.num_hidden_layers
    compute = 2 * 2 * config.parameters * tokens + products + 10 * config.parameters * config.hidden_size
    memory = _traversal(config, tokens, device) + 8 * gram + _layer(config)
    return Needs(memory, files + compute / COMPUTE[device], size)


def portable_engine(config: ModelConfig, recipe: Recipe, mapping: Mapping, limits: BuildLimits) -> Needs:
    """The largest of a rank's weights, as it is read and as it is written. SmolLM2-135M 4.1, 7B 1.3, 1/8 of 70B 3.1."""
    constants = constants_of_rank(config, recipe, mapping, limits.max_length)
    size = sum(constants.values())
    read = checkpoint_bytes(config, "float32") / mapping.world_size
    return Needs(4 * max(constants.values()), (read + size) / FILES, size)


def tensorrt_engine(config: ModelConfig, recipe: Recipe, mapping: Mapping, limits: BuildLimits) -> Needs:
    """A builder holds its weights several times over. SmolLM2-135M 2.1."""
    size = weights_of_rank(config, recipe, mapping, limits)
    return Needs(6 * size, size / TENSORRT, 2 * size)


def engine_config(config: ModelConfig, recipe: Recipe, mapping: Mapping, limits: BuildLimits) -> Needs:
    """Every file of weights and of engines is hashed."""
    size = (
        checkpoint_bytes(config, "float32") + 2 * weights_of_rank(config, recipe, mapping, limits) * mapping.world_size
    )
    return Needs(0, size / FILES)


def run(
    config: ModelConfig, recipe: Recipe, mapping: Mapping, limits: BuildLimits, prompts: int, steps: int, device: Device
) -> Needs:
    """An engine with `prompts` tokens of prompts and `steps` generation steps, all ranks together.

    On a CPU weights are mapped, a product's is widened, and logits of a whole prompt are there three times.
    Perplexity: LLaMA-7B 1.4, SmolLM2-135M 2.1, on three ranks 2.3; summaries of SmolLM2-135M 4.0.
    """
    size = weights_of_rank(config, recipe, mapping, limits)
    caches = cache_of_rank(config, recipe, mapping, limits)
    if device == "cpu":  # where a page holds a sequence, and one is for padding
        caches = max(caches, PAGES_ON_CPU) + caches // limits.max_batch_size
    rank = size + caches + _step(config, limits.max_input_len)
    if device == "cuda":
        rank = max(rank, CUDA_BASE)
    memory = rank * mapping.world_size + BASE * (mapping.world_size - 1)
    compute = 2 * config.parameters * prompts / COMPUTE[device] + steps * size / STEPS[device]
    return Needs(memory, size * mapping.world_size / FILES + compute)


def baseline(config: ModelConfig, dtype: str, limits: BuildLimits, prompts: int, steps: int, device: Device) -> Needs:
    """The Hugging Face model, whose weights are read in their own dtype and held in `dtype`. SmolLM2-135M 1.9."""
    size = checkpoint_bytes(config, dtype)
    memory = size + checkpoint_bytes(config, "float16") + _step(config, limits.max_input_len)
    compute = 2 * config.parameters * prompts / COMPUTE[device] + steps * size / STEPS[device]
    return Needs(memory + (CUDA_BASE if device == "cuda" else 0), 2 * size / FILES + compute)


def _largest(config: ModelConfig) -> int:
    """Bytes of a model's largest tensor, in float32."""
    return max(map(math.prod, config.tensor_shapes().values())) * 4


def _layer(config: ModelConfig) -> int:
    """Bytes of a layer's weights, in float32."""
    attention = 2 * config.query_size + 2 * config.kv_size
    return (attention + 3 * config.intermediate_size) * config.hidden_size * 4


def _traversal(config: ModelConfig, tokens: int, device: Device) -> int:
    """A layer's weights as read and as used, or the embedding's; hidden states and a product's inputs and outputs."""
    weights = 3 * max(_layer(config), config.vocab_size * config.hidden_size * 4)
    states = tokens * (2 * config.hidden_size + 3 * config.intermediate_size) * 4
    return weights + (CUDA_BASE if device == "cuda" else states)


def _step(config: ModelConfig, tokens: int) -> int:
    """A prompt's logits in float32, three times, and the output product's weight, widened."""
    return (3 * tokens + config.hidden_size) * config.vocab_size * 4
