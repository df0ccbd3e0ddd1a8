"""What is inside an engine folder or a checkpoint, for people."""

import math
from collections import Counter
from pathlib import Path

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.engine.config import read_config
from trtbuild.engine.portable import read_portable
from trtbuild.tensors.quantized_weight import QuantizedWeight


def describe_engine(folder: Path, nodes: bool = False, check: bool = False) -> str:
    """Model, recipe, limits, files and the network's operations of an engine folder (checked as by `read_config`)."""
    config = read_config(folder, check)
    lines = [
        f"{name:22} {config[name]}"
        for name in ("model", "recipe", "mapping", "limits", "remove_input_padding", "builders")
    ]
    lines += [f"{name:22} {f['bytes'] / 2**20:.1f} MiB, sha256 {f['sha256']}" for name, f in config["outputs"].items()]
    lines += [f"built from {name:11} sha256 {digest}" for name, digest in config["inputs"].items()]
    for file in (folder / name for name in config["outputs"] if name.endswith(".safetensors")):
        network, _ = read_portable(file)
        weights = sum(constant.nbytes for constant in network.constants.values())
        counts = Counter(type(node.op).__name__ for node in network.nodes)
        operations = ", ".join(f"{n} {name}" for name, n in counts.items())
        lines.append(
            f"{file.stem:22} {len(network.nodes)} operations ({operations}), {weights / 2**20:.1f} MiB of weights"
        )
        if nodes:
            for node in network.nodes:
                outputs = ", ".join(f"{name} {list(network.tensors[name].shape)}" for name in node.outputs)
                inputs = ", ".join(f"{parameter}={name}" for parameter, name in node.inputs.items())
                lines.append(f"  {outputs} = {node.op}({inputs})")
    return "\n".join(lines)


def describe_checkpoint(folder: Path) -> str:
    """Configuration, dtypes and size of a canonical checkpoint."""
    checkpoint = Checkpoint(folder)
    parameters: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if isinstance(tensor, QuantizedWeight):
            parameters[tensor.format] += math.prod(tensor.values.shape)
        else:
            parameters[str(tensor.dtype).removeprefix("torch.")] += math.prod(tensor.shape)
    lines = [f"{name:26} {value}" for name, value in vars(checkpoint.config).items()]
    lines.append(f"{'tensors':26} {len(checkpoint.tensors)}")
    lines += [f"{'parameters in ' + dtype:26} {count / 1e6:.1f} M" for dtype, count in parameters.items()]
    lines += [f"{'file':26} {file.name}, {file.stat().st_size / 2**20:.1f} MiB" for file in checkpoint.files]
    return "\n".join(lines)
