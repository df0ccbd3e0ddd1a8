"""Write the checkpoints of this folder with the packages whose formats they are; README.md names the versions.

    python make_fixtures.py llmcompressor|gptqmodel|autoawq

Run it once a package, in an environment that has it. Each folder gets the package's own checkpoint of one tiny random
LLaMA, and `expected.safetensors`: every quantized weight in float32, dequantized by the package's own code (from
scales widened to float32 first, so that nothing rounds).
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
QUANTIZERS = HERE.parent / "benchmarks" / "peer_quantizers.py"
CONFIG = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
FIXTURES = {
    "gptqmodel": {
        "gptqmodel-sym": ["--peer", "gptqmodel-gptq", "--symmetric", "--dtype", "float16"],
        "gptqmodel-asym": ["--peer", "gptqmodel-gptq", "--dtype", "float16"],
        "gptqmodel-act-order": ["--peer", "gptqmodel-gptq", "--act-order", "--group-size", "32", "--dtype", "float16"],
    },
    "llmcompressor": {
        "llmcompressor-int4-sym": ["--peer", "llmcompressor-int4", "--symmetric", "--dtype", "bfloat16"],
        "llmcompressor-int4-asym": ["--peer", "llmcompressor-int4", "--dtype", "bfloat16"],
        "llmcompressor-int8": ["--peer", "llmcompressor-int8", "--dtype", "bfloat16"],
        "llmcompressor-w8a8-static": ["--peer", "llmcompressor-smoothquant", "--dtype", "bfloat16"],
        "llmcompressor-w8a8-dynamic": ["--peer", "llmcompressor-smoothquant", "--dynamic", "--dtype", "bfloat16"],
        "llmcompressor-fp8": ["--peer", "llmcompressor-fp8", "--dtype", "bfloat16"],
        "llmcompressor-fp8-dynamic": ["--peer", "llmcompressor-fp8-dynamic", "--dtype", "bfloat16"],
    },
    "autoawq": {"autoawq-gemm": []},
}


def make_base(folder: Path) -> list[list[int]]:
    """The tiny model, the same from every version of transformers, and its calibration samples."""
    draw = torch.Generator().manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    for name, weight in sorted(model.named_parameters()):
        values = torch.randn(weight.shape, generator=draw)
        if weight.ndim == 1:
            values = 1 + 0.1 * values
        else:
            values = 0.05 * (values + torch.randn((len(values), 1), generator=draw))  # lopsided rows
            if "proj" in name:
                values[::9] = values[::9].abs()  # a zero point at one end of its range
                values[4::9] = -values[4::9].abs()  # and at the other
        weight.data = values
    model.half().save_pretrained(folder)
    words = WordLevel({str(token): token for token in range(CONFIG["vocab_size"])}, unk_token="0")
    Tokenizer(words).save(str(folder / "tokenizer.json"))  # the packages ask for a tokenizer and use none
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "0"}')
    return [torch.randint(CONFIG["vocab_size"], (n,), generator=draw).tolist() for n in range(24, 40)]


def expected_of_llmcompressor(folder: Path) -> dict[str, torch.Tensor]:
    """What compressed-tensors decompresses."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(json.loads((folder / "config.json").read_text())["quantization_config"])
    scheme = config.config_groups["group_0"]
    modules: dict[str, dict] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    decompress = BaseCompressor.get_value_from_registry(scheme.format).decompress
    expected = {}
    for module, tensors in modules.items():
        if "weight_scale" in tensors:
            tensors["weight_scale"] = tensors["weight_scale"].float()
            expected[f"{module}.weight"] = decompress(tensors, scheme)["weight"]
    return expected


def expected_of_gptqmodel(folder: Path) -> dict[str, torch.Tensor]:
    """What GPTQModel's portable kernel dequantizes."""
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    expected = {}
    model = GPTQModel.load(str(folder), device="cpu", dtype=torch.float16, backend=BACKEND.TORCH)
    for name, module in model.model.named_modules():
        if isinstance(module, TorchLinear):
            module.scales = module.scales.float()
            expected[f"{name}.weight"] = module.dequantize_weight().T
    return expected


def quantize_with_autoawq(base: Path, samples: list[list[int]], folder: Path) -> None:
    """AutoAWQ's GEMM layout; it calibrates on the samples joined and cut into rows of 64."""
    from awq import AutoAWQForCausalLM

    config = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    model = AutoAWQForCausalLM.from_pretrained(str(base), device_map="cpu", use_cache=False)
    model.quantize(None, quant_config=config, calib_data=samples, max_calib_seq_len=64)
    model.save_quantized(str(folder))


def expected_of_autoawq(folder: Path) -> dict[str, torch.Tensor]:
    """What AutoAWQ's plain kernel dequantizes."""
    from awq.utils.packing_utils import dequantize_gemm

    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for module in {name.rpartition(".")[0] for name in tensors if name.endswith("qweight")}:
        qweight, qzeros, scales = (tensors[f"{module}.{leaf}"] for leaf in ("qweight", "qzeros", "scales"))
        expected[f"{module}.weight"] = dequantize_gemm(qweight, qzeros, scales.float(), 4, 64).T
    return expected


def main() -> None:
    """Make the fixtures of one package."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=sorted(FIXTURES))
    package = parser.parse_args().package
    with tempfile.TemporaryDirectory() as scratch:
        base, tokens = Path(scratch, "base"), Path(scratch, "tokens.json")
        samples = make_base(base)
        tokens.write_text(json.dumps({"input_ids": samples}))
        for fixture, arguments in FIXTURES[package].items():
            made, folder = Path(scratch, fixture), HERE / fixture
            if package == "autoawq":
                quantize_with_autoawq(base, samples, made)
            else:
                paths = ["--model", base, "--tokens", tokens, "--output", made]
                subprocess.run([sys.executable, QUANTIZERS, *arguments, *paths], check=True)
            expected = globals()[f"expected_of_{package}"](made)
            assert len(expected) == 14, sorted(expected)
            assert all(weight.dtype == torch.float32 for weight in expected.values())
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            for name in ("model.safetensors", "config.json"):
                folder.joinpath(name).write_bytes(made.joinpath(name).read_bytes())
            expected = {name: weight.contiguous() for name, weight in expected.items()}
            folder.joinpath("expected.safetensors").write_bytes(save(expected))


if __name__ == "__main__":
    main()
