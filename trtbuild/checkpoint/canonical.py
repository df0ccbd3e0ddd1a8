"""The canonical checkpoint: a folder with `config.json`, safetensors under Hugging Face LLaMA names, a tokenizer.

Weights may be quantized, in one of the published layouts (`formats/`).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from trtbuild.checkpoint.formats import read_quantized
from trtbuild.checkpoint.meta import is_meta
from trtbuild.checkpoint.weight_files import open_weights, weight_files
from trtbuild.errors import UserError
from trtbuild.files import read_json, sha256, sha256_of
from trtbuild.models.config import PRODUCTS, ModelConfig
from trtbuild.models.families import FAMILIES, config_from_hugging_face, is_canonical
from trtbuild.tensors.lazy import FLOATS, LazyTensor
from trtbuild.tensors.quantized_weight import QuantizedWeight, Weight

W = TypeVar("W", bound=Weight)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ORIGIN_FILE = "quantization.json"  # of a quantized folder: what it was made from


class Checkpoint:
    """An open canonical checkpoint; every tensor stays on disk until it is asked for.

    `quant_method` is the layout of its quantized weights (gptq, awq, compressed-tensors), or None. Raises `UserError`
    for a missing or truncated file, a missing tensor, or a tensor of the wrong shape.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        hint = f"make a checkpoint with 'trtbuild convert --local {self.folder} --output-dir CHECKPOINT'"
        if is_meta(self.folder):
            raise UserError(f"{self.folder} is a model in Meta's layout, not a canonical checkpoint; {hint}")
        config = published_config(self.folder)
        if config.get("model_type") in FAMILIES and not is_canonical(config):
            raise UserError(f"{self.folder} is a published {config['model_type']} model, not a checkpoint; {hint}")
        self.config = config_from_hugging_face(config, self.folder / "config.json")
        self.files = list(weight_files(self.folder))
        tensors = open_weights(self.folder)
        self.tensors: dict[str, Weight] = {**tensors}
        self.quant_method: str | None = None
        if quantization := _quantization_config(self.folder, config):
            self.tensors = read_quantized(quantization, tensors, str(self.folder))
            self.quant_method = str(quantization["quant_method"])
            self._drop_empty_biases()
            self._check_fused()
        self.config, self.tensors = settle_head(self.config, self.tensors)
        check_tensors(self.config, self.tensors, self.folder)

    @classmethod
    def in_memory(cls, config: ModelConfig, tensors: Mapping[str, Weight]) -> "Checkpoint":
        """One without files: weights that are computed when they are asked for."""
        checkpoint = cls.__new__(cls)
        checkpoint.config, checkpoint.tensors = config, dict(tensors)
        checkpoint.files, checkpoint.quant_method = [], None
        return checkpoint

    @property
    def inputs(self) -> dict[str, Path]:
        """The files that it was read from, by their names inside the folder."""
        files = [self.folder / "config.json", *self.files] if self.files else []
        return {str(file.relative_to(self.folder)): file for file in files}

    @cached_property
    def hashes(self) -> dict[str, str]:
        """The sha256 of each of these files."""
        return {name: sha256(file) for name, file in self.inputs.items()}

    @cached_property
    def source_sha256(self) -> str | None:
        """What tells one original model from another: the sha256 of its files' hashes; None without files.

        A folder of quantized weights has recorded its original's.
        """
        origin = self.folder / ORIGIN_FILE if self.files else None
        recorded = read_json(origin).get("source_sha256") if origin and origin.exists() else None
        return recorded or (sha256_of(self.hashes) if self.files else None)

    def __getitem__(self, name: str) -> Weight:
        return self.tensors[name]

    def quantized(self) -> list[QuantizedWeight]:
        """All its quantized weights."""
        return [tensor for tensor in self.tensors.values() if isinstance(tensor, QuantizedWeight)]

    @property
    def rounds_activations(self) -> bool:
        """Whether a product rounds its input, too."""
        return any(weight.activations != "16bit" for weight in self.quantized())

    def dequantized(self, name: str) -> LazyTensor:
        """A tensor as plain numbers: float32 where it is quantized."""
        tensor = self.tensors[name]
        return tensor.dequantize() if isinstance(tensor, QuantizedWeight) else tensor

    def _drop_empty_biases(self) -> None:
        """Drops biases of zeros that the model does not have: AutoGPTQ wrote one for every product."""
        for name in self.tensors.keys() - self.config.tensor_shapes().keys():
            if name.endswith(".bias") and not self.dequantized(name).load().any():
                del self.tensors[name]

    def _check_fused(self) -> None:
        for i in range(self.config.num_hidden_layers):
            for parts in PRODUCTS.values():
                products = [f"model.layers.{i}.{part}" for part in parts]
                weights = [self.tensors.get(f"{name}.weight") for name in products]
                for (a, first), (b, second) in pairwise(zip(products, weights, strict=True)):
                    together = f"{self.folder}: {a} and {b} are computed as one product and must"
                    if getattr(first, "kind", None) != getattr(second, "kind", None):
                        raise UserError(f"{together} be quantized alike")
                    if not (isinstance(first, QuantizedWeight) and isinstance(second, QuantizedWeight)):
                        continue
                    if not first.same_order(second):
                        raise UserError(f"{together} have one order of input channels (desc_act, g_idx)")


def published_config(folder: Path) -> dict:
    """A model folder's `config.json`; where there is none, a `UserError` that says what the folder is instead."""
    if (folder / "config.json").exists():
        return read_json(folder / "config.json")
    if folder.is_file():
        gguf = "; a GGUF file is a source of its own, 'gguf'" if folder.suffix == ".gguf" else ""
        raise UserError(f"{folder} is a file; a model's folder is expected{gguf}")
    if not folder.is_dir():
        raise UserError(f"the model folder {folder} does not exist")
    if snapshots := sorted((folder / "snapshots").glob("*/")):
        main = folder / "refs" / "main"
        snapshot = folder / "snapshots" / main.read_text().strip() if main.exists() else snapshots[-1]
        raise UserError(f"{folder} is a repository in the hub's cache; the model's folder is {snapshot}")
    if snapshots := sorted(folder.glob("models--*/snapshots/*/")):
        raise UserError(f"{folder} is the hub's cache; a model's folder is a snapshot in it, such as {snapshots[0]}")
    if (adapter := folder / "adapter_config.json").exists():
        base = read_json(adapter).get("base_model_name_or_path")
        raise UserError(
            f"{folder} holds an adapter of {base}, and no model; merge it into that and save the result as a folder"
        )
    raise UserError(f"{folder / 'config.json'} does not exist")


def settle_head(config: ModelConfig, tensors: dict[str, W]) -> tuple[ModelConfig, dict[str, W]]:
    """What a tied model's tensors mean, as in `transformers`: a head of its own unties it, an equal one is dropped.

    Where only the head is stored it is the embedding as well.
    """
    if not config.tie_word_embeddings or HEAD not in tensors:
        return config, tensors
    others = {name: tensor for name, tensor in tensors.items() if name != HEAD}
    head, embedding = tensors[HEAD], tensors.get(EMBEDDING)
    if embedding is None:
        return config, {EMBEDDING: head} | others
    same = isinstance(head, LazyTensor) and isinstance(embedding, LazyTensor) and _equal(head, embedding)
    return (config, others) if same else (replace(config, tie_word_embeddings=False), tensors)


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and a.load().equal(b.load())


def check_tensors(config: ModelConfig, tensors: Mapping[str, Weight], where: Path) -> None:
    """Raises `UserError` for tensors that are missing, too many, of another shape or no floating-point numbers."""
    shapes = config.tensor_shapes()
    for name in sorted(tensors.keys() - shapes.keys()):
        raise UserError(f"{where}: the tensor {name} is no part of the model that config.json describes")
    for name, shape in shapes.items():
        if name not in tensors:
            raise UserError(f"{where}: tensor {name} is missing; config.json asks for it with shape {shape}")
        tensor = tensors[name]
        if isinstance(tensor, QuantizedWeight) and name == EMBEDDING:
            raise UserError(f"{where}: tensor {name} is quantized; only products may be")
        if isinstance(tensor, LazyTensor) and tensor.dtype not in FLOATS:
            raise UserError(
                f"{where}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, and nothing says how it is "
                "quantized; a floating-point tensor, or its scales, are expected"
            )
        actual = tensor.values.shape if isinstance(tensor, QuantizedWeight) else tensor.shape
        if actual != shape:
            raise UserError(f"{where}: tensor {name} has shape {actual}, config.json asks for {shape}")


def _quantization_config(folder: Path, config: dict) -> dict | None:
    """What `config.json`, or for old GPTQ and AWQ checkpoints a file beside it, says of quantization."""
    if quantization := config.get("quantization_config"):
        return quantization
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / file).exists():
            return {"quant_method": method} | read_json(folder / file)
    return None
