"""GGUF files of LLaMA models to canonical checkpoints.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package maps the file and dequantizes;
this module knows names, the configuration, and that GGUF stores rotary projections with interleaved halves.
"""

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trtbuild.errors import UserError
from trtbuild.files import refuse_lfs_pointer
from trtbuild.limits import GGUF_ITEMS
from trtbuild.models.families import config_from_hugging_face
from trtbuild.tensors.lazy import LazyTensor, from_tensor, half_rotary

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

# What the package, and `struct`, raise for files that are not what they seem.
DAMAGE = (ValueError, LookupError, TypeError, OverflowError, AttributeError, MemoryError, EOFError, struct.error)
# The metadata's types: a number's bytes, and the two that have lengths.
BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
# What llama.cpp reads of a file of this architecture, and what it computes otherwise for others; docs/formats.md says
# what each means. Any other key of the architecture is refused, for it may change results.
REQUIRED = (
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.layer_norm_rms_epsilon",
)
OPTIONAL = (
    "vocab_size",
    "attention.head_count_kv",
    "attention.key_length",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
)
IGNORED = ("tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")
# Keys that change results, with the values that leave a LLaMA as it is.
NEUTRAL: dict[str, tuple[float | str | bool, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.sliding_window": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "use_parallel_residual": (False,),
    "pooling_type": (0,),
}


def gguf_parts(path: Path) -> list[Path]:
    """All files of a model whose file is `path`: of a split one every part, from the name of any.

    Raises `UserError` if a file is missing, or is a folder or a Git LFS pointer.
    """
    parts = [path]
    if match := re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})\.gguf", path.name):
        count = int(match[3])
        parts = [path.with_name(f"{match[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if part.is_dir():
            raise UserError(f"{part} is a folder; give the GGUF file, or the folder as a source of kind 'local'")
        if not part.is_file():
            of = f", a part of the same model as {path.name}," if len(parts) > 1 and path.is_file() else ""
            raise UserError(f"{part}{of} does not exist")
        refuse_lfs_pointer(part)
    return parts


def read_gguf(path: Path) -> tuple[dict, dict[str, LazyTensor]]:
    """The Hugging Face configuration and the float32 tensors (dequantized on `load()`) of a GGUF file or all its parts.

    Raises `UserError` if a file is missing, truncated, not GGUF, not LLaMA, or its metadata says what is not computed.
    """
    import gguf

    parts = gguf_parts(path)
    readers = [_open(part) for part in parts]
    fields = _metadata(path, readers[0])
    _check_split(parts, readers)
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path} holds a model of the architecture {architecture!r}; only 'llama' is supported from GGUF"
        )
    stored = [tensor for reader in readers for tensor in reader.tensors]
    config = _config(path, fields, {tensor.name for tensor in stored})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    tensors = {}
    for tensor in stored:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
        if not match or (stem := match[2]) not in NAMES:
            raise UserError(f"{path}: the tensor {tensor.name} is not part of a LLaMA model that trtbuild knows")
        name = ".".join([*(["model.layers", match[1]] if match[1] else []), NAMES[stem], match[3]])
        shape = tuple(int(n) for n in reversed(tensor.shape))

        def load(tensor: Any = tensor) -> torch.Tensor:
            value = gguf.dequantize(tensor.data, tensor.tensor_type)
            return torch.from_numpy(np.require(value, requirements=["C", "W"]))  # unquantized data is a read-only map

        tensors[name] = LazyTensor(torch.float32, shape, load)
        if stem in heads:
            tensors[name] = half_rotary(tensors[name], heads[stem])
    for name, shape in config_from_hugging_face(config, path).tensor_shapes().items():
        if name.endswith(".bias") and name not in tensors:  # LLaMA has biases on all of attention's products or none
            tensors[name] = from_tensor(torch.zeros(shape))
    return config, tensors


def _open(path: Path) -> Any:
    import gguf

    try:
        _check_lengths(path)
        reader = gguf.GGUFReader(path)
    except DAMAGE as error:
        raise UserError(f"{path} is truncated or not a GGUF file ({error})") from error
    # One after another, as llama.cpp demands; the package would take any bytes of the file, also another tensor's.
    place = reader.data_offset
    for tensor in reader.tensors:
        if tensor.data_offset != place:
            raise UserError(
                f"{path} is damaged: the tensor {tensor.name} is said to begin at byte {tensor.data_offset}, the one "
                f"before ends at {place}; fetch it again"
            )
        place += -(-tensor.n_bytes // reader.alignment) * reader.alignment
    return reader


def _check_lengths(path: Path) -> None:
    """Raises `EOFError` for lengths that reach beyond the file, and `ValueError` for arrays that nobody needs.

    The package would count to them, whatever they are, and remember every step.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:

        def skip(count: int) -> None:
            if file.tell() + count > size:
                raise EOFError("a length reaches beyond its end")
            file.seek(count, 1)

        def number(code: str) -> int:
            data = file.read(struct.calcsize(f"<{code}"))
            return struct.unpack(f"<{code}", data)[0]

        def value(kind: int) -> None:
            if kind == STRING:
                skip(number("Q"))
            elif kind == ARRAY:
                kind, count = number("I"), number("Q")
                if count > GGUF_ITEMS:
                    raise ValueError(f"an array of {count} values; at most {GGUF_ITEMS} are expected")
                if kind == STRING:
                    for _ in range(count):
                        value(kind)
                else:
                    skip(count * BYTES[kind])
            else:
                skip(BYTES[kind])

        skip(8)  # magic and version
        tensors, keys = number("Q"), number("Q")
        for _ in range(keys):
            value(STRING)
            value(number("I"))
        for _ in range(tensors):
            value(STRING)
            skip(8 * number("I") + 4 + 8)  # dimensions; type and offset


def read_metadata(path: Path) -> dict:
    """All values of a GGUF file by their keys; `UserError` where one cannot be read."""
    return _metadata(path, _open(path))


def _metadata(path: Path, reader: Any) -> dict:
    fields = {}
    for name, field in reader.fields.items():
        try:
            fields[name] = field.contents()
        except DAMAGE as error:
            raise UserError(
                f"{path}: the metadata key {name} cannot be read ({error}); fetch the file again"
            ) from error
    return fields


def _check_split(parts: list[Path], readers: list) -> None:
    """Raises `UserError` unless the files say themselves that they are the parts of one model."""
    for i, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        count, number = (
            field.contents() if (field := reader.get_field(f"split.{key}")) else default
            for key, default in (("count", 1), ("no", 0))
        )
        if (count or 1, number) != (len(parts), i):
            name = "NAME-00001-of-00002.gguf"
            raise UserError(f"{part} is part {number + 1} of {count}; the parts' names must say so, as {name} does")


def _config(path: Path, fields: dict, tensor_names: set[str]) -> dict:
    values = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    for key in REQUIRED:
        if key not in values:
            raise UserError(f"{path}: the metadata key llama.{key} is missing")
    layers = values["block_count"]
    for key in ("attention.head_count", "attention.head_count_kv", "feed_forward_length"):
        if isinstance(each := values.get(key), list):
            if len(set(each)) != 1 or len(each) != layers:
                raise UserError(f"{path}: llama.{key} differs by layer, {each}; only models with equal layers are read")
            values[key] = each[0]
    has_bias = lambda names: any(f".{name}.bias" in tensor for name in names for tensor in tensor_names)
    try:
        heads = values["attention.head_count"]
        head_dim = values.get("attention.key_length") or values["embedding_length"] // heads
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": values.get("vocab_size") or len(fields.get("tokenizer.ggml.tokens", ())),
            "hidden_size": values["embedding_length"],
            "intermediate_size": values["feed_forward_length"],
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": values.get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": values["context_length"],
            # A float32 in the file; its shortest decimal is what the model's author wrote.
            "rms_norm_eps": float(str(np.float32(values["attention.layer_norm_rms_epsilon"]))),
            "rope_theta": float(values.get("rope.freq_base", 10000.0)),
            "tie_word_embeddings": "output.weight" not in tensor_names,
            "attention_bias": has_bias(("attn_q", "attn_k", "attn_v", "attn_output")),
            "mlp_bias": has_bias(("ffn_gate", "ffn_up", "ffn_down")),
            "dtype": "float32",
        }
    except (TypeError, ZeroDivisionError) as error:
        raise UserError(f"{path}: a metadata value has the wrong type or is zero ({error})") from error
    _check_neutral(path, values, head_dim)
    if "rope_freqs.weight" in tensor_names:
        raise UserError(
            f"{path}: RoPE scaling 'rope_freqs.weight' in GGUF is not supported; use the model's Hugging Face folder"
        )
    if scaling := _rope_scaling(path, values):
        config["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config


def _check_neutral(path: Path, values: dict, head_dim: int) -> None:
    """Raises `UserError` for metadata that makes another model of a LLaMA, or that is not known."""
    if type(head_dim) is not int or head_dim < 1:
        raise UserError(f"{path}: the heads have {head_dim} channels; a positive integer is expected")
    neutral = NEUTRAL | {"attention.value_length": (head_dim,), "rope.dimension_count": (head_dim,)}
    neutral["attention.scale"] += (float(np.float32(head_dim**-0.5)),)
    for key, value in values.items():
        if key in neutral and value not in neutral[key]:
            expected = " or ".join(map(str, neutral[key]))
            raise UserError(f"{path}: llama.{key} is {value}, which is not computed; LLaMA's models have {expected}")
        if key not in neutral and key not in REQUIRED + OPTIONAL + IGNORED:
            raise UserError(f"{path}: the metadata key llama.{key} ({value}) is not known, and may change results")


def _rope_scaling(path: Path, values: dict) -> dict | None:
    """As llama.cpp reads it: linear where no type is given; 0 is 1, and the old key counts without the new one."""
    kind = values.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise UserError(f"{path}: RoPE scaling {kind!r} in GGUF is not supported; use the model's Hugging Face folder")
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 0)) or 1
    return None if kind == "none" or factor == 1 else {"rope_type": "linear", "factor": float(factor)}
