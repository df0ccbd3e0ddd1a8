"""A process that builds a rank's file of models whose weights are holes in files, and says how much memory that takes.

`python memory_of_builds.py FOLDER SCALE TP_SIZE SOURCE ...`: LLaMA-2 70B with two layers, smaller by `SCALE` in each
direction; for each source a line of JSON: the bytes of the file, and of the process's peak beyond what it held before.
"""

import json
import os
import sys
from pathlib import Path

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.models.families import config_from_hugging_face
from trtbuild.tensors.safetensors_stream import NAMES

GROUP = 128
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
PACKED = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
SOURCES = {
    "float16": None,
    "gptq": GPTQ,
    "awq": AWQ,
    "int4": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": PACKED}}},
    "int8": {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": INT8}}},
}
Spec = tuple[torch.dtype, list[int]]


def model(scale: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000 // scale,
        "hidden_size": 8192 // scale,
        "intermediate_size": 28672 // scale,
        "num_hidden_layers": 2,
        "num_attention_heads": 64 // scale,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def stored(source: str, name: str, shape: tuple[int, ...]) -> dict[str, Spec]:
    """What a source has of a tensor, by name."""
    prefix = name.removesuffix(".weight")
    if source == "float16" or not name.endswith("_proj.weight"):
        return {name: (torch.float16, [*shape])}
    (out, width), groups = shape, shape[1] // GROUP
    return {
        "gptq": {
            f"{prefix}.qweight": (torch.int32, [width // 8, out]),
            f"{prefix}.qzeros": (torch.int32, [groups, out // 8]),
            f"{prefix}.scales": (torch.float16, [groups, out]),
        },
        "awq": {
            f"{prefix}.qweight": (torch.int32, [width, out // 8]),
            f"{prefix}.qzeros": (torch.int32, [groups, out // 8]),
            f"{prefix}.scales": (torch.float16, [groups, out]),
        },
        "int4": {
            f"{prefix}.weight_packed": (torch.int32, [out, width // 8]),
            f"{prefix}.weight_scale": (torch.float16, [out, groups]),
        },
        "int8": {f"{prefix}.weight": (torch.int8, [out, width]), f"{prefix}.weight_scale": (torch.float32, [out, 1])},
    }[source]


def write_source(folder: Path, source: str, scale: int) -> None:
    """A checkpoint of zeros that takes no room."""
    folder.mkdir()
    config, quantization = model(scale), SOURCES[source]
    tensors: dict[str, Spec] = {}
    for name, shape in config_from_hugging_face(config, "").tensor_shapes().items():
        tensors |= stored(source, name, shape)
    header, size = {}, 0
    for name, (dtype, shape) in tensors.items():
        end = size + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [size, end]}
        size = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    config |= {"quantization_config": quantization} if quantization else {}
    (folder / "config.json").write_text(json.dumps(config))


def memory(kind: str) -> int:
    """`VmRSS`, what the process holds, or `VmHWM`, its peak, in bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) * 1024


def build(folder: Path, source: str, scale: int, tp_size: int) -> None:
    """Of its own process: a next build would find memory that this one's has freed, but kept."""
    write_source(folder / source, source, scale)
    target = folder / f"{source}.safetensors"
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    build_portable(Checkpoint(folder / source), target, torch.float16, BuildLimits(), Mapping(tp_size, rank=1))
    print(json.dumps({"source": source, "peak": memory("VmHWM") - before, "file": target.stat().st_size}), flush=True)
    target.unlink()


def main(folder: str, scale: str, tp_size: str, *sources: str) -> None:
    torch.set_num_threads(1)
    for source in sources:
        if child := os.fork():
            os.waitpid(child, 0)
        else:
            build(Path(folder), source, int(scale), int(tp_size))
            return


if __name__ == "__main__":
    main(*sys.argv[1:])
