"""What is right for a damaged file: what readers that we did not write find in it, and which values make sense."""

import json
import math
import zipfile
from pathlib import Path

import gguf
import numpy as np
import torch
import yaml
from gguf_files import gguf_name, heads_of, is_rotary, permute
from published_models import META_NAMES, Tensors, published_again
from safetensors.torch import load_file

POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "kv_channels", "seq_length"),
    *("layer_norm_epsilon", "dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps", "multiple_of"),
)
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_dynamic_ntk", "use_logn_attn", "no_bias")


def meaning(path: Path) -> object:
    """A file's content, equal for files that say the same."""
    if not path.is_file():
        return None
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".yaml":
            return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, yaml.YAMLError):
        pass
    return path.read_bytes()


def senseless(path: Path, original: Path) -> str | None:
    """What nobody should take from a file that says it."""
    if path.suffix == ".npz":
        return _senseless_arrays(path, original)
    content = meaning(path)
    if path.name not in ("config.json", "params.json") or not isinstance(content, dict) or "outputs" in content:
        return None
    if (path.parents[1] / "engine").exists():  # only the ends of generation are read
        return None
    for key in POSITIVE:
        value = content.get(key)
        if value is None or (path.name == "params.json" and key == "vocab_size"):  # it says -1
            continue
        try:
            makes_sense = not isinstance(value, bool) and 0 < float(value) < math.inf
        except (TypeError, ValueError, OverflowError):
            makes_sense = False
        if not makes_sense:
            return f"{key} {str(value)[:20]}"
    for key in FLAGS:
        if not isinstance(content.get(key), bool | None):
            return f"{key} {str(content[key])[:20]!r}"
    return None


def _senseless_arrays(path: Path, original: Path) -> str | None:
    """Ranges and factors are float32 a channel, of the names that are there, and never negative, infinite or NaN."""
    with np.load(original) as file:
        expected = dict(file)
    try:
        with np.load(path) as file:
            found = dict(file)
    except Exception as error:
        return f"numpy: {type(error).__name__}"
    if found.keys() != expected.keys():
        return f"names {sorted(found.keys() ^ expected.keys())[:2]}"
    for name, x in found.items():
        if x.dtype.kind != expected[name].dtype.kind or (x.dtype.kind == "f" and x.dtype != np.float32):
            return f"dtype {x.dtype}"
        if x.shape != expected[name].shape:
            return f"shape {x.shape}"
        if x.dtype.kind == "f" and not (np.isfinite(x).all() and (x >= 0).all()):
            return "not finite, or negative"
    return None


def read_independently(folder: Path) -> Tensors:
    """All tensors of a folder's weight files, by the libraries of their formats; these raise what they like."""
    tensors: Tensors = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            tensors |= load_file(path)
        elif path.suffix in (".bin", ".pth"):
            with zipfile.ZipFile(path) as archive:
                assert archive.testzip() is None, "CRC-32"
            tensors |= torch.load(path, weights_only=True)
        elif path.suffix == ".gguf":
            tensors |= _read_gguf(path)
    return tensors


def _read_gguf(path: Path) -> Tensors:
    """Offsets have to be as the format says: one tensor after the other."""
    tensors, offset = {}, 0
    reader = gguf.GGUFReader(path)
    for tensor in reader.tensors:
        assert tensor.data_offset == reader.data_offset + offset, "offset"
        offset += -(-tensor.n_bytes // reader.alignment) * reader.alignment
        shape = tuple(map(int, reversed(tensor.shape)))
        x = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        tensors[tensor.name] = torch.from_numpy(np.array(x))
    return tensors


def published(checkpoint: Path, layout: str) -> Tensors:
    """A canonical checkpoint's tensors as the file has them that they came from."""
    tensors: Tensors = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(path)
    match layout:
        case "published":
            return published_again(tensors)
        case "gguf":
            arrays = {name: x.float().numpy() for name, x in tensors.items()}
            arrays = {name: permute(x, heads_of(name)) if is_rotary(name) else x for name, x in arrays.items()}
            return {gguf_name(name): torch.from_numpy(x) for name, x in arrays.items()}
        case "meta":
            return dict(map(_as_meta, tensors.items()))
    return tensors


def _as_meta(item: tuple[str, torch.Tensor]) -> tuple[str, torch.Tensor]:
    name, x = item
    prefix, _, stem = name.removesuffix(".weight").rpartition("layers.0.")
    if is_rotary(name):
        x = torch.from_numpy(permute(x.numpy(), heads_of(name)))
    return f"{'layers.0.' if prefix else ''}{META_NAMES[stem][0]}.weight", x


def other_weights(folder: Path, checkpoint: Path, layout: str) -> str | None:
    """Says where a checkpoint differs from what is stored in the folder that it was made of."""
    try:
        stored = read_independently(folder)
    except Exception as error:
        return f"accepted what other readers refuse: {type(error).__name__} {str(error)[:60]}"
    for name, x in published(checkpoint, layout).items():
        if name not in stored or not same_bits(x, stored[name]):
            return f"{name} is not what is stored"
    return None


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """NaN equals NaN."""
    return x.shape == y.shape and x.dtype == y.dtype and torch.allclose(x, y, rtol=0, atol=0, equal_nan=True)


def unusable(folder: Path) -> str | None:
    """What no output may be: a link to something else than a file, or JSON that is none."""
    for path in folder.rglob("*"):
        if path.is_symlink():
            if not path.is_file():
                return f"accepted {path.name}, which is not a file"
        elif path.suffix == ".json":
            try:
                json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda name: 1 / 0)
            except ZeroDivisionError:
                return f"{path.name} holds NaN or infinity"
            except (ValueError, RecursionError):
                return f"{path.name} is not JSON"
    return None
