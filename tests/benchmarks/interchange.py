"""Whether other packages read our quantized checkpoints as we do.

    python interchange.py FOLDER...

Run it in an environment that has the package of the folder's layout (gptqmodel and optimum for GPTQ and AWQ,
compressed-tensors for the others). Each folder is loaded by `transformers` with that package, on the CPU, and by
trtbuild, whose model is `transformers`' own with the dequantized weights; the logits of some tokens are compared.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from transformers import AutoModelForCausalLM

from trtbuild.evaluation.hugging_face import HuggingFaceModel


def main() -> None:
    """One line a folder: relative difference of all logits."""
    for folder in sys.argv[1:]:
        ids = list(range(100, 164))
        expected = HuggingFaceModel(folder, device="cpu").logits(ids)
        theirs = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
        kinds = sorted({type(module).__name__ for module in theirs.modules() if "Linear" in type(module).__name__})
        with torch.inference_mode():
            actual = theirs(torch.tensor([ids])).logits[0].float()
        error = ((actual - expected).norm() / expected.norm()).item()
        print(f"{Path(folder).name}: {', '.join(kinds)}: relative difference of the logits {error:.1e}")


if __name__ == "__main__":
    main()
