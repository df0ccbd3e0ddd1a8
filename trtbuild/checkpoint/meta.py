"""LLaMA as Meta distributes it: `params.json` and `consolidated.NN.pth`, one file a rank of its tensor parallelism."""

import re
from pathlib import Path

import torch

from trtbuild.checkpoint.torch_file import open_torch_file
from trtbuild.errors import UserError
from trtbuild.files import read_json
from trtbuild.limits import MODEL_SIZE
from trtbuild.models.config import SHARED_DIMENSIONS
from trtbuild.tensors.lazy import LazyTensor, concatenate, half_rotary

NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "norm": "model.norm",
    "output": "lm_head",
}
DIMENSIONS = SHARED_DIMENSIONS | {"model.embed_tokens": 1}  # Meta's ranks share each word's channels
CODE_LLAMA_THETA = 1e6
PARAMS = (
    *("dim", "n_layers", "n_heads", "n_kv_heads", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta"),
    *("vocab_size", "max_seq_len", "max_batch_size"),  # without effect on results
)


def is_meta(folder: Path) -> bool:
    """Whether a folder holds weights in Meta's layout."""
    return (folder / "params.json").exists() and not (folder / "config.json").exists()


def read_meta(folder: Path) -> tuple[dict, dict[str, LazyTensor]]:
    """The Hugging Face configuration, and the tensors under canonical names, joined from any number of shards.

    Rotary projections are permuted from interleaved pairs to halves. Raises `UserError` for a missing shard, for shards
    that hold different tensors, and for tensors that are not LLaMA's.
    """
    files = _shard_files(folder)
    shards = [open_torch_file(file) for file in files]
    for file, shard in zip(files, shards, strict=True):
        for name in sorted(shards[0].keys() ^ shard.keys()):
            owner, other = (files[0], file) if name in shards[0] else (file, files[0])
            raise UserError(f"{owner} holds the tensor {name}, {other.name} does not; the shards are not of one model")
    try:
        config = _config(read_json(folder / "params.json"), folder / "params.json", shards)
        _check_world(folder, config, shards)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{folder}: params.json or the shards are not LLaMA's ({error} is missing or wrong)") from error
    heads = {"attention.wq": config["num_attention_heads"], "attention.wk": config["num_key_value_heads"]}
    tensors = {}
    for name in shards[0]:
        match = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", name)
        if name == "rope.freqs":  # derived from the configuration
            continue
        if not match or match[2] not in NAMES:
            raise UserError(f"{files[0]}: the tensor {name} is not part of a LLaMA model")
        canonical = NAMES[match[2]]
        dim = DIMENSIONS.get(canonical)
        _check_alike(name, dim, files, shards)
        tensor = shards[0][name] if dim is None else concatenate([shard[name] for shard in shards], dim)
        if match[2] in heads:
            tensor = half_rotary(tensor, heads[match[2]])
        tensors[f"model.layers.{match[1]}.{canonical}.weight" if match[1] else f"{canonical}.weight"] = tensor
    return config, tensors


def _check_alike(name: str, dim: int | None, files: list[Path], shards: list[dict[str, LazyTensor]]) -> None:
    """Ranks must hold a tensor alike; what none shares (`dim` None) must be equal."""
    first = shards[0][name]
    for file, shard in zip(files[1:], shards[1:], strict=True):
        other = shard[name]
        same = (other.dtype, other.shape) == (first.dtype, first.shape)
        if not same or (dim is None and not torch.equal(other.load(), first.load())):
            raise UserError(f"{file} holds another {name} than {files[0].name}; the shards are not of one model")


def _shard_files(folder: Path) -> list[Path]:
    files = ((re.fullmatch(r"consolidated\.(\d+)\.pth", file.name), file) for file in folder.glob("consolidated.*.pth"))
    ranks = {int(match[1]): file for match, file in files if match}
    if not ranks:
        raise UserError(f"{folder} has params.json but no consolidated.00.pth; download the weights into it")
    for rank in range(max(ranks)):
        if rank not in ranks:
            raise UserError(f"{folder}: the shard consolidated.{rank:02d}.pth is missing; download it")
    return [ranks[rank] for rank in sorted(ranks)]


def _config(params: dict, where: Path, shards: list[dict[str, LazyTensor]]) -> dict:
    """`params.json` in Hugging Face's terms. The vocabulary's size is the tensors': most files give it as -1."""
    for key, value in params.items():
        if key not in PARAMS and (key, value) != ("use_scaled_rope", False):
            raise UserError(
                f"{where}: {key} ({value}) is not known, and may change results; use the model's Hugging Face folder"
            )
    for key in ("dim", "n_heads", "n_layers", "multiple_of"):
        if type(params[key]) is not int or not 1 <= params[key] <= MODEL_SIZE:
            raise UserError(f"{where}: {key} is {params[key]!r}; a positive integer is expected")
    dim, heads, multiple = params["dim"], params["n_heads"], params["multiple_of"]
    inner = int((params.get("ffn_dim_multiplier") or 1) * int(8 * dim / 3))  # SwiGLU's 2/3 of 4 dim, rounded up
    theta = float(10000.0 if params.get("rope_theta") is None else params["rope_theta"])
    # Nowhere in the files: CodeLlama's by its base, LLaMA 1's by its epsilon (but for 65B).
    epsilon = float(params["norm_eps"])
    length = 16384 if theta == CODE_LLAMA_THETA else 2048 if epsilon == 1e-6 else 4096
    output = [shard["output.weight"] for shard in shards]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sum(part.shape[0] for part in output),
        "hidden_size": dim,
        "intermediate_size": -(-inner // multiple) * multiple,
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": params.get("n_kv_heads") or heads,
        "hidden_act": "silu",
        "max_position_embeddings": length,
        "rms_norm_eps": epsilon,
        "rope_theta": theta,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": str(output[0].dtype).removeprefix("torch."),
    }


def _check_world(folder: Path, config: dict, shards: list[dict[str, LazyTensor]]) -> None:
    """The last shards may be missing without a gap in the numbers: then the others hold a share of the rows."""
    rows = shards[0]["layers.0.attention.wq.weight"].shape[0]
    world = config["hidden_size"] // rows if rows else 0
    if world > len(shards):
        missing = ", ".join(f"consolidated.{rank:02d}.pth" for rank in range(len(shards), world))
        raise UserError(f"{folder}: {len(shards)} of {world} shards are there; missing: {missing}")
