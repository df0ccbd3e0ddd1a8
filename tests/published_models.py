"""Small random models as their authors publish them: configuration, tensor names, file formats, shards."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from trtbuild.checkpoint.dummy import save_byte_tokenizer

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN = {
    "architectures": ["QWenLMHeadModel"],
    "auto_map": {
        "AutoConfig": "configuration_qwen.QWenConfig",
        "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
    },
    "model_type": "qwen",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "kv_channels": 16,
    "layer_norm_epsilon": 1e-6,
    "max_position_embeddings": 512,
    "seq_length": 512,
    "no_bias": True,
    "rotary_emb_base": 10000,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
BAICHUAN = {
    "architectures": ["BaichuanForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_baichuan.BaichuanConfig"},
    "model_type": "baichuan",
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,  # no power of two
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
META = {"dim": 48, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5, "vocab_size": -1}

Tensors = dict[str, torch.Tensor]


def baichuan_config(version: str, **changes) -> dict:
    """The 7B models' configurations say how many positions RoPE knows, the 13B models' how long a text may be."""
    length = {"max_position_embeddings" if version.endswith("7b") else "model_max_length": 512}
    return BAICHUAN | length | changes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Products keep a normal input's size; norms lie around 1, biases are small."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        x = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            x = 0.1 * x if name.endswith("bias") else 1 + 0.2 * x
        elif not any(part in name for part in ("embed", "wte")):
            x *= shape[1] ** -0.5
        tensors[name] = x
    return tensors


def llama_tensors(config: dict, seed: int = 0) -> Tensors:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = hidden // config["num_attention_heads"]
    keys = config.get("num_key_value_heads", config["num_attention_heads"]) * head_dim
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
        }
    return random_tensors(shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}, seed)


def qwen_tensors(config: dict, seed: int = 0) -> Tensors:
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"] // 2, config["vocab_size"]
    shapes = {"transformer.wte.weight": (vocab, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        shapes |= {
            f"{layer}.ln_1.weight": (hidden,),
            f"{layer}.attn.c_attn.weight": (3 * hidden, hidden),
            f"{layer}.attn.c_attn.bias": (3 * hidden,),
            f"{layer}.attn.c_proj.weight": (hidden, hidden),
            f"{layer}.ln_2.weight": (hidden,),
            f"{layer}.mlp.w1.weight": (inner, hidden),
            f"{layer}.mlp.w2.weight": (inner, hidden),
            f"{layer}.mlp.c_proj.weight": (hidden, inner),
        }
    return random_tensors(shapes | {"transformer.ln_f.weight": (hidden,), "lm_head.weight": (vocab, hidden)}, seed)


def baichuan_tensors(config: dict, seed: int = 0) -> Tensors:
    tensors = llama_tensors(config, seed)
    packed: Tensors = {}
    for name, x in tensors.items():
        if name.endswith("q_proj.weight"):
            parts = [tensors[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            packed[name.replace("q_proj", "W_pack")] = torch.cat(parts)
        elif not name.endswith(("k_proj.weight", "v_proj.weight")):
            packed[name] = x
    head = "lm_head.weight"
    packed[head] *= torch.linspace(0.2, 5, len(packed[head]))[:, None]  # rows as different as a NormHead allows
    return packed


QWEN_NAMES = {
    "model.embed_tokens": "transformer.wte",
    "model.layers": "transformer.h",
    "model.norm": "transformer.ln_f",
    "input_layernorm": "ln_1",
    "self_attn.W_pack": "attn.c_attn",
    "self_attn.o_proj": "attn.c_proj",
    "post_attention_layernorm": "ln_2",
    "mlp.up_proj": "mlp.w1",
    "mlp.gate_proj": "mlp.w2",
    "mlp.down_proj": "mlp.c_proj",
}


def published_again(tensors: Tensors) -> Tensors:
    """Canonical tensors under the names of Qwen, which has biases, or of Baichuan. A NormHead stays normalized."""
    is_qwen = any(name.endswith("q_proj.bias") for name in tensors)
    published = {}
    for name, x in tensors.items():
        if ".k_proj." in name or ".v_proj." in name:
            continue
        if ".q_proj." in name:
            x = torch.cat([tensors[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"])
            name = name.replace("q_proj", "W_pack")
        for ours, theirs in QWEN_NAMES.items() if is_qwen else ():
            name = name.replace(ours, theirs)
        published[name] = x
    return published


def write_published(
    folder: Path,
    config: dict,
    tensors: Tensors,
    *,
    shards: int = 1,
    safetensors: bool = False,
    tokenizer: Callable[[Path], object] = save_byte_tokenizer,
) -> Path:
    """A Hugging Face folder with `pytorch_model*.bin` or safetensors, in one file or in shards with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    stem, suffix = ("model", ".safetensors") if safetensors else ("pytorch_model", ".bin")
    save = save_file if safetensors else torch.save
    names = list(tensors)
    if shards == 1:
        save({name: tensors[name].contiguous() for name in names}, folder / f"{stem}{suffix}")
    else:
        weight_map = {}
        size = -(-len(names) // shards)
        for i in range(shards):
            file = f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}"
            part = names[i * size : (i + 1) * size]
            save({name: tensors[name].contiguous() for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        index = {"metadata": {"total_size": sum(x.nbytes for x in tensors.values())}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    tokenizer(folder)
    return folder


META_NAMES = {
    "self_attn.q_proj": ("attention.wq", 0),
    "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0),
    "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0),
    "mlp.down_proj": ("feed_forward.w2", 1),
    "mlp.up_proj": ("feed_forward.w3", 0),
    "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None),
    "model.embed_tokens": ("tok_embeddings", 1),
    "model.norm": ("norm", None),
    "lm_head": ("output", 0),
}


def write_meta(folder: Path, params: dict, tensors: Tensors, world: int = 1) -> Path:
    """Hugging Face LLaMA tensors as Meta's shards: rotary halves to interleaved pairs, split as Meta's model splits."""
    folder.mkdir(parents=True)
    (folder / "params.json").write_text(json.dumps(params))
    heads = {"self_attn.q_proj": params["n_heads"], "self_attn.k_proj": params.get("n_kv_heads") or params["n_heads"]}
    ranks: list[Tensors] = [{} for _ in range(world)]
    for name, x in tensors.items():
        stem = name.removesuffix(".weight")
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, i, stem = stem.split(".", 3)
            prefix = f"layers.{i}."
        if stem in heads:
            x = x.view(heads[stem], 2, -1, x.shape[1]).transpose(1, 2).reshape(x.shape)
        theirs, dim = META_NAMES[stem]
        parts = [x] * world if dim is None else x.chunk(world, dim)
        for rank, part in zip(ranks, parts, strict=True):
            rank[f"{prefix}{theirs}.weight"] = part.clone()
    head_dim = params["dim"] // params["n_heads"]
    for i, rank in enumerate(ranks):
        rank["rope.freqs"] = 1.0 / 10000 ** (torch.arange(0, head_dim, 2) / head_dim)
        torch.save(rank, folder / f"consolidated.{i:02d}.pth")
    return folder
