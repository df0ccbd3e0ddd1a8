"""Quantize a model with another package and save the checkpoint in that package's own format.

    python peer_quantizers.py --peer llmcompressor-gptq --model FOLDER --tokens TOKENS.json --group-size 64 --output OUT

TOKENS.json holds `{"input_ids": [[...], [...]]}`, the calibration samples as token ids, fed one by one and unpadded.
Run it in an environment that has the peer; it imports nothing of trtbuild. The last line printed is JSON: the peer,
its version, the seconds of calibrating and quantizing (`seconds`, no loading or saving) and the bytes of the weights.
"""

import argparse
import json
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch

PEERS = [
    *(f"llmcompressor-{method}" for method in ("gptq", "awq", "smoothquant", "fp8", "fp8-dynamic", "int8", "int4")),
    "gptqmodel-gptq",
]


def llmcompressor_recipe(args: argparse.Namespace) -> list:
    """The modifiers of a peer: every linear but the head, no activation order, min-max ranges."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    int4 = {"num_bits": 4, "strategy": "group", "group_size": args.group_size, "symmetric": args.symmetric}
    int8 = {"num_bits": 8, "strategy": "channel", "symmetric": True}
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    per_token = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
    # The package's default for static inputs is a moving average that stays near the first sample.
    per_tensor = {"num_bits": 8, "strategy": "tensor", "symmetric": True, "observer": "static_minmax"}
    weights, inputs = {
        "gptq": (int4, None),
        "awq": (int4, None),
        "int4": (int4, None),
        "int8": (int8, None),
        "smoothquant": (int8, per_token if args.dynamic else per_tensor),
        "fp8": (fp8, {**fp8, "observer": "static_minmax"}),
        "fp8-dynamic": ({**fp8, "strategy": "channel"}, {**per_token, "type": "float"}),
    }[args.method]
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=QuantizationArgs(**inputs) if inputs else None,
    )
    config = {"config_groups": {"group_0": scheme}, "ignore": ["lm_head"]}
    if args.method == "gptq":
        return [GPTQModifier(dampening_frac=args.damping, actorder=None, **config)]
    before = {"awq": [AWQModifier()], "smoothquant": [SmoothQuantModifier(smoothing_strength=0.5)]}
    return [*before.get(args.method, []), QuantizationModifier(**config)]


def with_llmcompressor(args: argparse.Namespace, samples: list[list[int]]) -> float:
    """Quantize with llmcompressor, save compressed-tensors; returns the seconds of `oneshot`."""
    from llmcompressor import oneshot
    from llmcompressor.pipelines.cache import IntermediatesCache
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    recipe = llmcompressor_recipe(args)
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None  # AWQ pins its cache, which fails on a machine without a GPU
    data = None
    if args.method not in ("int8", "int4", "fp8-dynamic"):
        rows = [{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()} for ids in samples]
        data = DataLoader(rows, batch_size=None, shuffle=False)
    start = time.perf_counter()
    oneshot(model=model, recipe=recipe, dataset=data, num_calibration_samples=len(samples))
    seconds = time.perf_counter() - start
    model.save_pretrained(args.output, save_compressed=True)
    for pattern in ("tokenizer*", "chat_template*"):
        for file in args.model.glob(pattern):
            shutil.copy(file, args.output)
    return seconds


def with_gptqmodel(args: argparse.Namespace, samples: list[list[int]]) -> float:
    """Quantize with GPTQModel, save its GPTQ format; returns the seconds of `quantize`."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with fewer it does not start
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import GPTQConfig

    config = GPTQConfig(
        bits=4,
        group_size=args.group_size,
        sym=args.symmetric,
        desc_act=args.act_order,
        act_group_aware=False,
        damp_percent=args.damping,
        offload_to_disk=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPTQModel.load(str(args.model), config, device=device, dtype=args.dtype)
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in samples]
    start = time.perf_counter()
    model.quantize(rows, batch_size=1, calibration_sort=None, calibration_data_min_length=1, backend=BACKEND.TORCH)
    seconds = time.perf_counter() - start
    model.save(str(args.output))
    return seconds


def main() -> None:
    """Parse the arguments, run the peer, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=PEERS, required=True)
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder, not quantized")
    parser.add_argument("--tokens", type=Path, required=True, help="JSON file of the calibration samples")
    parser.add_argument("--output", type=Path, required=True, help="folder for the quantized checkpoint")
    parser.add_argument("--group-size", type=int, default=64, help="of the 4-bit weights")
    parser.add_argument("--symmetric", action="store_true", help="4-bit weights without zero points")
    parser.add_argument("--act-order", action="store_true", help="gptqmodel: groups of channels by their activations")
    parser.add_argument("--dynamic", action="store_true", help="smoothquant: quantize the activations of each token")
    parser.add_argument("--damping", type=float, default=0.01, help="of GPTQ, a fraction of the mean diagonal")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32", help="to load as")
    args = parser.parse_args()
    args.package, args.method = args.peer.split("-", 1)
    args.dtype = getattr(torch, args.dtype)
    samples = json.loads(args.tokens.read_text())["input_ids"]
    torch.manual_seed(0)
    seconds = (with_gptqmodel if args.package == "gptqmodel" else with_llmcompressor)(args, samples)
    size = sum(file.stat().st_size for file in args.output.glob("*.safetensors"))
    tokens = sum(map(len, samples))
    report = {"peer": args.peer, "version": version(args.package), "seconds": round(seconds, 2), "bytes": size}
    print(json.dumps({**report, "samples": len(samples), "tokens": tokens, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
