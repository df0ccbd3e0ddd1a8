"""Every family from its authors' files to logits: against float64 oracles, and quantized by every shipped recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import pytest
import reference_models
import torch
from published_models import (
    LLAMA,
    META,
    QWEN,
    Tensors,
    baichuan_config,
    baichuan_tensors,
    llama_tensors,
    published_again,
    qwen_tensors,
    write_meta,
    write_published,
)
from reference_models import baichuan_logits, qwen_logits

pytest.importorskip("tensorrt_rtx")

from outlier_models import SAMPLES, calibrated
from test_recipes import COSTS as RECIPE_COSTS
from test_recipes import INT8, RECIPES, TOLERANCE, adapted, error, logits, rounded_in_steps
from test_recipes import LIMITS as RECIPE_LIMITS

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.dummy import save_byte_tokenizer
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.decoder.decoder import CacheScales
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine, read_portable
from trtbuild.engine.tensorrt import LoweredNetwork
from trtbuild.evaluation.baseline import PortableBaseline, open_baseline
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.network import Network
from trtbuild.quantization.kv_cache import cache_of
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Recipe
from trtbuild.runtime.lowered_session import InterpretedSession
from trtbuild.runtime.session import PortableSession, Session

CPU = torch.device("cpu")
# Norm of the difference over the norm of one sequence's logits, and of a token's twice that; 9e-7 measured at most.
EXACT = 2e-6
LIMITS = BuildLimits(max_batch_size=6, max_input_len=300, max_output_len=8)
STEPS = 4

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True)
class Model:
    """A checkpoint made from published files; `oracle(ids, prompt)`: every token's logits after so long a prompt."""

    checkpoint: Path
    oracle: Callable[[list[int], int], torch.Tensor]
    config: dict


def converted(folder: Path, config: dict, tensors: Tensors, oracle: Callable, version: str | None = None) -> Model:
    """A model whose authors publish a Hugging Face folder."""
    published = write_published(folder / "published", config, tensors, shards=2)
    make_checkpoint({"local": {"path": str(published), "model_version": version}}, folder / "checkpoint")
    return Model(folder / "checkpoint", oracle, config)


def transformers_llama(config: dict, tensors: Tensors) -> Callable[[list[int], int], torch.Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**config)).double().eval()
    model.load_state_dict(tensors)
    return torch.inference_mode()(lambda ids, prompt: model(torch.tensor([ids])).logits[0])


def llama(folder: Path, change: Callable = lambda tensors: tensors, **changes) -> Model:
    config = LLAMA | changes
    tensors = change(llama_tensors(config))
    return converted(folder, config, tensors, transformers_llama(config, tensors))


def meta(folder: Path, world: int, **changes) -> Model:
    """As Meta publishes a LLaMA, in `world` shards."""
    params = META | changes
    heads = {"num_attention_heads": params["n_heads"], "num_key_value_heads": params["n_kv_heads"]}
    inner = -(-(params["dim"] * 8 // 3) // params["multiple_of"]) * params["multiple_of"]
    config = LLAMA | heads | {"hidden_size": params["dim"], "intermediate_size": inner}
    tensors = llama_tensors(config)
    save_byte_tokenizer(write_meta(folder / "published", params, tensors, world))
    make_checkpoint({"local": {"path": str(folder / "published")}}, folder / "checkpoint")
    return Model(folder / "checkpoint", transformers_llama(config, tensors), config)


def qwen(folder: Path, change: Callable = lambda tensors: tensors, **changes) -> Model:
    config = QWEN | changes
    tensors = change(qwen_tensors(config))
    return converted(folder, config, tensors, partial(qwen_logits, config, tensors))


def baichuan(folder: Path, version: str, change: Callable = lambda tensors: tensors, **changes) -> Model:
    config = baichuan_config(version, **changes)
    tensors = change(baichuan_tensors(config))
    return converted(folder, config, tensors, lambda ids, _: baichuan_logits(config, tensors, ids, version), version)


def heads(number: int, size: int) -> dict:
    return {"num_attention_heads": number, "hidden_size": number * size}


TRAINED = 64  # tokens that a small Qwen was trained for
MODELS = {
    "llama": llama,
    "llama in one head of keys": partial(llama, num_attention_heads=3, num_key_value_heads=1),
    "meta in one file": partial(meta, world=1),
    "meta in two files": partial(meta, world=2),
    "meta in four files": partial(meta, world=4, dim=96, n_heads=12, n_kv_heads=4),
    "qwen": qwen,
    "qwen beyond": partial(qwen, seq_length=TRAINED),
    "qwen beyond, ntk alone": partial(qwen, seq_length=TRAINED, use_logn_attn=False),
    "qwen beyond, log-n alone": partial(qwen, seq_length=TRAINED, use_dynamic_ntk=False),
    "baichuan 7b": partial(baichuan, version="v1_7b"),
    "baichuan 7b, 5 heads": partial(baichuan, version="v1_7b", **heads(5, 16)),
    "baichuan2 7b": partial(baichuan, version="v2_7b", **heads(3, 16)),
    "baichuan 13b, 3 heads": partial(baichuan, version="v1_13b", **heads(3, 16)),
    "baichuan 13b, 12 heads": partial(baichuan, version="v1_13b", **heads(12, 8)),
    "baichuan 13b, 40 heads": partial(baichuan, version="v1_13b", **heads(40, 4)),
    "baichuan2 13b, 5 heads": partial(baichuan, version="v2_13b", **heads(5, 16)),
    "baichuan2 13b, 6 heads": partial(baichuan, version="v2_13b"),
    "baichuan2 13b, 40 heads": partial(baichuan, version="v2_13b", **heads(40, 8)),
}


def lengths(name: str) -> tuple[int, ...]:
    """Prompts on both sides of what changes a Qwen's frequencies and queries; a decode step passes 64 and 128."""
    return (7, 64, 65, 128, 129, 300) if "beyond" in name else (7, 1, 300)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and its float32 network by name."""

    @cache
    def make(name: str) -> tuple[Model, Network]:
        folder = tmp_path_factory.mktemp("family")
        model = MODELS[name](folder)
        build_portable(model.checkpoint, folder / "engine", torch.float32, LIMITS, Mapping())
        return model, read_portable(folder / "engine")[0]

    return make


def session(kind: str, network: Network, limits: BuildLimits) -> Session:
    if kind == "portable":
        return PortableSession(PortableEngine(network, limits, CPU))
    return InterpretedSession(network, limits, kind == "packed")


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 320, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def ragged(lengths: tuple[int, ...]) -> tuple[list[list[int]], torch.Tensor, list[list[int]]]:
    """Prompts, the tokens that follow them step by step, and the sequences that they make."""
    prompts = [random_tokens(n, seed=n).tolist() for n in lengths]
    new_tokens = random_tokens(STEPS, len(lengths))
    return prompts, new_tokens, [prompt + new_tokens[:, i].tolist() for i, prompt in enumerate(prompts)]


kinds = pytest.mark.parametrize("kind", ["portable", "packed", "padded"])


# In float32


@kinds
@pytest.mark.parametrize("name", MODELS)
def test_logits(made, name, kind):
    """Of every prompt, and of each decoded token by itself."""
    model, network = made(name)
    prompts, new_tokens, sequences = ragged(lengths(name))
    rows = logits(session(kind, network, LIMITS), prompts, new_tokens)
    for prompt, sequence, actual in zip(prompts, sequences, rows, strict=True):
        expected = model.oracle(sequence, len(prompt))
        assert error(actual, expected) < EXACT
        for i in range(len(prompt), len(sequence)):
            assert error(actual[i], expected[i]) < 2 * EXACT


@pytest.mark.parametrize("name", ["qwen", "baichuan 7b", "baichuan2 7b", "meta in two files"])
def test_what_transformers_makes_of_a_checkpoint(made, name):
    """Its own classes load what was made of published files, and compute the same."""
    from transformers import AutoModelForCausalLM

    model, network = made(name)
    theirs = AutoModelForCausalLM.from_pretrained(model.checkpoint, dtype=torch.float64, local_files_only=True)
    assert type(theirs).__name__ == ("Qwen2ForCausalLM" if name == "qwen" else "LlamaForCausalLM")
    ((ids,), _, _) = ragged((300,))
    actual = session("portable", network, LIMITS).prefill([ids], True)
    with torch.inference_mode():
        assert error(actual, theirs(torch.tensor([ids])).logits[0]) < EXACT


@pytest.mark.parametrize("length", [TRAINED, 2 * TRAINED])
@pytest.mark.parametrize("name", ["qwen beyond", "qwen beyond, ntk alone"])
def test_a_generated_token_does_not_change_the_base(made, name, length):
    """A prompt that is as long as the base allows keeps it; a base chosen anew would be seen."""
    model, network = made(name)
    prompts, new_tokens, (sequence,) = ragged((length,))
    for kind in ("portable", "packed", "padded"):
        (actual,) = logits(session(kind, network, LIMITS), prompts, new_tokens)
        assert error(actual[length:], model.oracle(sequence, length)[length:]) < 2 * EXACT
        assert error(actual[length:], model.oracle(sequence, length + 1)[length:]) > 0.02


def greedy(session: Session, prompts: list[list[int]], steps: int) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Continuations, and the logits of every token of every sequence but the last."""
    rows = [[x] for x in session.prefill(prompts, True).split([len(prompt) for prompt in prompts])]
    chosen: list[list[int]] = [[] for _ in prompts]
    for _ in range(steps):
        tokens = torch.stack([row[-1][-1] for row in rows]).argmax(-1).int()
        for sequence, row, token, x in zip(chosen, rows, tokens.tolist(), session.decode(tokens).clone(), strict=True):
            sequence.append(token)
            row.append(x[None])
    return chosen, [torch.cat(row) for row in rows]


@kinds
@pytest.mark.parametrize("name", ["baichuan 13b, 12 heads", "baichuan2 13b, 5 heads", "qwen beyond"])
def test_a_neighbour_changes_nothing(made, name, kind):
    """Alone, and beside shorter and longer ones: the same tokens, and the same logits but for the order of sums."""
    tested = session(kind, made(name)[1], LIMITS)
    prompts, _, _ = ragged((62, 300, 7, 65, 128))
    tokens, rows = greedy(tested, prompts, 6)
    for prompt, chosen, expected in zip(prompts, tokens, rows, strict=True):
        (own,), (actual,) = greedy(tested, [prompt], 6)
        assert own == chosen
        assert error(actual, expected) < EXACT
    assert len({tuple(chosen) for chosen in tokens}) == len(tokens)


# Quantized


def with_outliers(tensors: Tensors) -> Tensors:
    """The same function, with what quantization has to cope with: some channels behind a norm are 12 times larger."""
    readers = {
        "input_layernorm": ("q_proj", "k_proj", "v_proj", "W_pack"),
        "ln_1": ("c_attn",),
        "post_attention_layernorm": ("gate_proj", "up_proj"),
        "ln_2": ("w1", "w2"),
    }
    for name, x in tensors.items():
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        if norm in readers:
            x[3::16] *= 12
            for other, weight in tensors.items():
                if other.startswith(f"{layer}.") and other.removesuffix(".weight").endswith(readers[norm]):
                    weight[:, 3::16] /= 12
    return tensors


SMALL = {"change": with_outliers, "num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 160}
# A Qwen's training length, and prompts: two are longer, one of them so that it is generation that passes four times it.
SHORT = 6
PROMPTS = (13, 1, 22)
FAMILIES = {
    "llama": partial(llama, **SMALL, num_attention_heads=3, num_key_value_heads=1),
    "qwen": partial(qwen, **SMALL | {"intermediate_size": 320}, seq_length=SHORT, kv_channels=32),
    "baichuan v1_7b": partial(baichuan, version="v1_7b", **SMALL),
    "baichuan v2_13b": partial(baichuan, version="v2_13b", **SMALL),
}
ALIBI = "baichuan v2_13b"
OPTIONS = {
    "int8 NormHead": (ALIBI, {"weights": INT8, "quantize_lm_head": True}),
    "int4 NormHead, cache per head": (
        ALIBI,
        {
            "weights": {"dtype": "int4", "group_size": 32, "symmetric": False},
            "quantize_lm_head": True,
            "kv_cache": {"dtype": "int8", "per": "head"},
        },
    ),
    "gptq with its NormHead": (
        ALIBI,
        {"weights": {"dtype": "int4", "method": "gptq", "group_size": 32}, "quantize_lm_head": True},
    ),
    "static NormHead, fp8 cache per head": (
        ALIBI,
        {
            "weights": INT8,
            "activations": {"dtype": "int8", "smoothquant": 0.5},
            "quantize_lm_head": True,
            "kv_cache": {"dtype": "fp8", "per": "head"},
        },
    ),
    "qwen but for some": ("qwen", {"weights": INT8, "keep_16bit": ["*.o_proj", "model.layers.1.self_attn.*"]}),
    "awq qwen but for some, cache per head": (
        "qwen",
        {
            "weights": {"dtype": "int4", "method": "awq", "group_size": 32},
            "keep_16bit": ["model.layers.0.self_attn.[qkv]_proj"],
            "kv_cache": {"dtype": "fp8", "per": "head"},
        },
    ),
    "smoothed qwen but for some, cache per head": (
        "qwen",
        {
            "weights": INT8,
            "activations": {"dtype": "int8", "per": "token", "smoothquant": 0.8},
            "keep_16bit": ["*.down_proj"],
            "kv_cache": {"dtype": "int8", "per": "head"},
        },
    ),
    "llama, cache per head": ("llama", {"weights": INT8, "kv_cache": {"dtype": "int8", "per": "head"}}),
}
# As in test_recipes.py. In float32 one of three sequences has to be free of numbers that are rounded the other way.
TOLERANCES = TOLERANCE | {("weights", "bfloat16"): (1.5e-2, 1.5e-2)}
COSTS = RECIPE_COSTS | {"int4": (2e-2, 0.5)}  # these weights have columns that int4 all but loses
families = pytest.mark.parametrize("family", FAMILIES)


class Quantized:
    """Models, their calibration files and quantized folders, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = cache(lambda family: FAMILIES[family](self._place(family)))
        self.ranges = cache(lambda family: calibrated(self.model(family).checkpoint))
        self._original = cache(lambda family: HuggingFaceModel(self.model(family).checkpoint, device="cpu"))

    def _place(self, name: str) -> Path:
        return self.folder / name.replace(" ", "-")

    def weights(self, family: str, recipe: dict) -> Path:
        quantization = Recipe.parse(recipe).quantization
        if not quantization:
            return self.model(family).checkpoint
        folder = self._place(family) / quantization.id
        if not folder.exists():
            quantize(self.model(family).checkpoint, folder, quantization, self.ranges(family), "cpu")
        return folder

    def cache(self, family: str, recipe: dict) -> CacheScales | None:
        return cache_of(Recipe.parse(recipe), self.weights(family, recipe), self.ranges(family))

    def network(self, family: str, recipe: dict, file: Path) -> Network:
        dtype, cache = getattr(torch, recipe["dtype"]), self.cache(family, recipe)
        build_portable(self.weights(family, recipe), file, dtype, RECIPE_LIMITS, Mapping(), cache)
        return read_portable(file)[0]


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    return Quantized(tmp_path_factory.mktemp("quantized"))


def check(quantized: Quantized, family: str, recipe: dict, file: Path) -> None:
    """Both engines against the family's baseline, on a ragged batch and four more tokens for each sequence."""
    network = quantized.network(family, recipe, file)
    prompts, new_tokens, sequences = ragged(PROMPTS)
    baseline = open_baseline(
        quantized.weights(family, recipe),
        device="cpu",
        cache=quantized.cache(family, recipe),
        max_input_len=RECIPE_LIMITS.max_input_len,
        max_output_len=RECIPE_LIMITS.max_output_len,
    )
    assert isinstance(baseline, PortableBaseline if family in ("qwen", ALIBI) else HuggingFaceModel)
    expected = [baseline.logits(x, prompt_len=len(prompt)) for prompt, x in zip(prompts, sequences, strict=True)]
    for kind in ("portable", "packed", "padded") if family == ALIBI else ("portable", "packed"):
        rows = logits(session(kind, network, RECIPE_LIMITS), prompts, new_tokens)
        best, median, last = sorted(map(error, rows, expected))
        most, worst = TOLERANCES[rounded_in_steps(recipe), recipe["dtype"]]
        assert (best if recipe["dtype"] == "float32" else median) < most
        assert last < worst
    oracle = quantized.model(family).oracle
    original = [oracle(sequence, len(prompt)) for prompt, sequence in zip(prompts, sequences, strict=True)]
    formats = [recipe[part]["dtype"] for part in ("weights", "kv_cache") if part in recipe] or [None]
    low, high = COSTS[formats[0]]
    assert low <= error(torch.cat(expected), torch.cat(original)) <= max(high, EXACT)


CASES = [(name, recipe["dtype"]) for name, recipe in RECIPES.items()]
CASES += [(name, "float32") for name, recipe in RECIPES.items() if recipe.keys() - {"dtype"}]


@pytest.mark.parametrize(("name", "dtype"), CASES)
@families
def test_recipe(quantized, tmp_path, family, name, dtype):
    check(quantized, family, adapted(RECIPES[name], dtype), tmp_path / "engine")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_option(quantized, tmp_path, name, dtype):
    family, options = OPTIONS[name]
    check(quantized, family, options | {"dtype": dtype, "calibration": SAMPLES}, tmp_path / "engine")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RECIPES)
def test_builds(quantized, tmp_path, family, name):
    """TensorRT-RTX compiles it, weights and all."""
    network = quantized.network(family, adapted(RECIPES[name], RECIPES[name]["dtype"]), tmp_path / "engine")
    lowered = LoweredNetwork(network, family != ALIBI)
    assert ("prompt_lengths" in lowered.lowering.inputs) == (family == "qwen")
    assert lowered.build(RECIPE_LIMITS, ["8.9"]).nbytes > network.weight_bytes


# What baselines that are our own engine rest on: the oracles, with the numbers that were written


def rounding_caches(cache: CacheScales) -> Callable:
    """The oracles' attention with the keys and values of each layer in turn rounded as a cache rounds them."""
    layers = iter(zip(cache.key_scales.double(), cache.value_scales.double(), strict=True))
    attend = reference_models.attend

    def levels(x: torch.Tensor) -> torch.Tensor:
        if cache.dtype == torch.int8:
            return x.round().clamp(-128, 127)
        return x.clamp(-448, 448).float().to(cache.dtype).double()

    def rounded(q, k, v, bias=0.0):
        k, v = (levels(x / s[:, None]) * s[:, None] for x, s in zip((k, v), next(layers), strict=True))
        return attend(q, k, v, bias)

    return rounded


WEIGHT_ONLY = ("int8wo", "int4wo", "gptq", "gptq-sym", "awq")
WITH_CACHES = ("int8kv", "fp16-fp8kv", "awq-int8kv")


@pytest.mark.parametrize("name", WEIGHT_ONLY + WITH_CACHES)
@pytest.mark.parametrize("family", ["qwen", "baichuan v1_7b", ALIBI])
def test_oracles_agree_on_the_numbers(quantized, tmp_path, monkeypatch, family, name):
    """A float32 engine computes what the published formulas do with a quantized folder's weights and scales."""
    recipe = adapted(RECIPES[name], "float32")
    network, scales = quantized.network(family, recipe, tmp_path / "engine"), quantized.cache(family, recipe)
    checkpoint = Checkpoint(quantized.weights(family, recipe))
    tensors = published_again({name: checkpoint.dequantized(name).load() for name in checkpoint.tensors})
    config = quantized.model(family).config
    prompts, new_tokens, sequences = ragged(PROMPTS)
    expected = []
    for prompt, sequence in zip(prompts, sequences, strict=True):
        with monkeypatch.context() as patch:
            if scales:
                patch.setattr(reference_models, "attend", rounding_caches(scales))
            if family == "qwen":
                expected.append(qwen_logits(config, tensors, sequence, len(prompt)))
            else:  # a NormHead is normalized already
                version = family.split()[1].replace("v2", "v1")
                expected.append(baichuan_logits(config, tensors, sequence, version))
    for kind in ("portable", "packed"):
        rows = logits(session(kind, network, RECIPE_LIMITS), prompts, new_tokens)
        _, median, last = sorted(map(error, rows, expected))
        assert median < EXACT
        assert last < (TOLERANCES["cache", "float32"][1] if scales else EXACT)
