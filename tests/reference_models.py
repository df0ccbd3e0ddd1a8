"""Published networks in plain float64, sequence by sequence, from published tensors: oracles for what no library has.

Sources: RoFormer (arXiv 2104.09864), ALiBi (2108.12409), Qwen (2309.16609), Baichuan2 (2309.10305).
"""

import math

import torch

Tensors = dict[str, torch.Tensor]


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, theta: float):
    """RoPE of `[tokens, heads, head_dim]` at positions 0, 1, ..., whose halves are the pairs' two members."""
    tokens, _, head_dim = x.shape
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(q, k, v, bias=0.0):
    """Causal attention of `[tokens, heads, head_dim]`; `bias` `[heads, tokens, tokens]` is added to the scores."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5 + bias
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return torch.einsum("hij,jhd->ihd", scores.masked_fill(future, float("-inf")).softmax(-1), v).flatten(1)


def alibi_slopes(heads: int) -> list[float]:
    """The paper's: a geometric sequence, and between its members where the heads are no power of two."""
    if math.log2(heads).is_integer():
        start = 2 ** (-8 / heads)
        return [start ** (i + 1) for i in range(heads)]
    lower = 2 ** math.floor(math.log2(heads))
    return alibi_slopes(lower) + alibi_slopes(2 * lower)[0::2][: heads - lower]


def alibi_bias(heads: int, tokens: int):
    positions = torch.arange(tokens, dtype=torch.float64)
    slopes = torch.tensor(alibi_slopes(heads), dtype=torch.float64)
    return slopes[:, None, None] * (positions[None, :] - positions[:, None])


def qwen_logits(config: dict, tensors: Tensors, ids: list[int], prompt: int | None = None) -> torch.Tensor:
    """`[tokens, vocab]` of the first Qwen; `prompt`: how many tokens were the prompt, which sets the base."""
    t = {name: x.double() for name, x in tensors.items()}
    heads, head_dim, trained = config["num_attention_heads"], config["kv_channels"], config["seq_length"]
    eps, length = config["layer_norm_epsilon"], prompt or len(ids)
    theta = config["rotary_emb_base"]
    if config["use_dynamic_ntk"]:
        doublings = 0
        while length > trained * 2**doublings:
            doublings += 1
        theta *= (2 ** (doublings + 1) - 1) ** (head_dim / (head_dim - 2))
    x = t["transformer.wte.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        layer = f"transformer.h.{i}"
        h = rms_norm(x, t[f"{layer}.ln_1.weight"], eps)
        qkv = h @ t[f"{layer}.attn.c_attn.weight"].T + t[f"{layer}.attn.c_attn.bias"]
        q, k, v = (part.unflatten(1, (heads, head_dim)) for part in qkv.chunk(3, -1))
        q, k = rotate(q, theta), rotate(k, theta)
        if config["use_logn_attn"]:
            scale = [max(1.0, math.log(p + 1) / math.log(trained)) for p in range(len(ids))]
            q = q * torch.tensor(scale, dtype=torch.float64)[:, None, None]
        x = x + attend(q, k, v) @ t[f"{layer}.attn.c_proj.weight"].T
        h = rms_norm(x, t[f"{layer}.ln_2.weight"], eps)
        up, gate = h @ t[f"{layer}.mlp.w1.weight"].T, h @ t[f"{layer}.mlp.w2.weight"].T
        x = x + (up * torch.nn.functional.silu(gate)) @ t[f"{layer}.mlp.c_proj.weight"].T
    return rms_norm(x, t["transformer.ln_f.weight"], eps) @ t["lm_head.weight"].T


def baichuan_logits(config: dict, tensors: Tensors, ids: list[int], version: str) -> torch.Tensor:
    """`[tokens, vocab]` of a Baichuan: 7B rotates, 13B has ALiBi; v2's head is normalized."""
    t = {name: x.double() for name, x in tensors.items()}
    heads, eps = config["num_attention_heads"], config["rms_norm_eps"]
    x = t["model.embed_tokens.weight"][ids]
    bias = alibi_bias(heads, len(ids)) if version.endswith("13b") else 0.0
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        h = rms_norm(x, t[f"{layer}.input_layernorm.weight"], eps)
        packed = (h @ t[f"{layer}.self_attn.W_pack.weight"].T).chunk(3, -1)
        q, k, v = (part.unflatten(1, (heads, -1)) for part in packed)
        if version.endswith("7b"):
            q, k = rotate(q, 10000.0), rotate(k, 10000.0)
        x = x + attend(q, k, v, bias) @ t[f"{layer}.self_attn.o_proj.weight"].T
        h = rms_norm(x, t[f"{layer}.post_attention_layernorm.weight"], eps)
        gate = torch.nn.functional.silu(h @ t[f"{layer}.mlp.gate_proj.weight"].T)
        x = x + (gate * (h @ t[f"{layer}.mlp.up_proj.weight"].T)) @ t[f"{layer}.mlp.down_proj.weight"].T
    head = t["lm_head.weight"]
    if version.startswith("v2"):
        head = head / head.norm(dim=1, keepdim=True)
    return rms_norm(x, t["model.norm.weight"], eps) @ head.T
