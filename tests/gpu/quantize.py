"""Time and GPU memory of calibrating and quantizing a model (dummy weights, float16) on one GPU; default: LLaMA-7B.

python tests/gpu/quantize.py [--model NAME] [--layers N] [--samples 128] [--length 2048] [--methods gptq awq round ...]
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from run import MODELS

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.dummy import dummy_tensors, save_byte_tokenizer
from trtbuild.files import write_json
from trtbuild.models.families import canonical_config, config_from_hugging_face
from trtbuild.quantization.calibration import activation_ranges, write_calibration
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Quantization
from trtbuild.tensors.safetensors_stream import write_sharded

GROUPS = {"dtype": "int4", "group_size": 128}
RECIPES = {
    "round": {"weights": {"dtype": "int8"}},
    "smoothquant": {
        "weights": {"dtype": "int8"},
        "activations": {"dtype": "int8", "per": "tensor", "smoothquant": 0.5},
    },
    "fp8": {"weights": {"dtype": "fp8"}, "activations": {"dtype": "fp8"}},
    "gptq": {"weights": GROUPS | {"method": "gptq"}},
    "awq": {"weights": GROUPS | {"method": "awq"}},
}


def main() -> None:
    """Make the model, run each method, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-7b", metavar="NAME", help="of config/models.yaml")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="default: all")
    parser.add_argument("--methods", nargs="*", default=list(RECIPES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        model = Path(work, "model")
        model.mkdir()
        config = canonical_config(MODELS[args.model]["config"], args.model) | {"bos_token_id": 0, "eos_token_id": 1}
        config["num_hidden_layers"] = args.layers or config["num_hidden_layers"]
        write_json(model / "config.json", config)
        tensors = dummy_tensors(config_from_hugging_face(config, args.model), 0, torch.float16, "cuda")
        write_sharded(model, {name: _on_cpu(tensor) for name, tensor in tensors.items()})
        save_byte_tokenizer(model)
        draw = torch.Generator().manual_seed(0)
        samples = torch.randint(0, config["vocab_size"], (args.samples, args.length), generator=draw).tolist()
        checkpoint, ranges = Checkpoint(model), Path(work, "ranges.npz")
        rows = []

        def timed(name: str, run) -> None:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds, peak = time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9
            billions = sum(t.nbytes for t in checkpoint.tensors.values()) / 2e9
            rows.append(f"| {name} | {seconds:.1f} | {seconds / billions:.1f} | {peak:.1f} |")
            print(rows[-1], flush=True)

        found = {}
        timed("calibration", lambda: found.update(activation_ranges(checkpoint, samples, torch.device("cuda"))))
        write_calibration(ranges, found, {}, checkpoint)
        for name in args.methods:
            quantization = Quantization.parse({"dtype": "float16"} | RECIPES[name])
            calibration = ranges if quantization.needs_ranges else None
            timed(name, lambda q=quantization, c=calibration: quantize(model, Path(work, "q"), q, c, samples=samples))
        print(f"\n{args.model}, {torch.cuda.get_device_name()}, {args.samples} samples of {args.length} tokens")
        print("| stage | s | s per billion weights | peak GPU memory, GB |\n| --- | --- | --- | --- |")
        print("\n".join(rows))


def _on_cpu(tensor):
    return type(tensor)(tensor.dtype, tensor.shape, lambda: tensor.load().cpu())


if __name__ == "__main__":
    main()
