"""The Hugging Face model of a canonical checkpoint: the baseline that every engine is compared with."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import CacheScales
from trtbuild.errors import UserError
from trtbuild.evaluation.fake_quantized import fake_quantized_cache, load_model
from trtbuild.evaluation.provenance import environment
from trtbuild.progress import item_bar
from trtbuild.runtime.generation import Output
from trtbuild.runtime.open import pick_device

ROOM = 0.9  # of a GPU's free memory for weights; the rest is for what is computed with them


class HuggingFaceModel:
    """`transformers`' model in a dtype. One prompt at a time: its batches pad, and padding moves its last bits.

    One that is larger than a GPU is spread over all of them, whole layers each (`spread`).

    Of a quantized checkpoint, and with a quantized KV `cache`, it is the model that computes the same in plain floating
    point: with the weights that the numbers mean, and activations, keys and values rounded where an engine rounds them.
    """

    name = "Hugging Face"

    def __init__(
        self, folder: Path | str, dtype: str = "float32", device: str = "auto", cache: CacheScales | None = None
    ) -> None:
        from transformers import GenerationConfig
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.checkpoint = Checkpoint(folder)
        self.dtype, self.device, self.cache = dtype, pick_device(device), cache
        places = spread(self.checkpoint, dtype) if self.device.type == "cuda" else {}
        model = load_model(self.checkpoint, getattr(torch, dtype), **places)
        self.gpus = len({*check_places(model.hf_device_map)}) if places else 1
        model.generation_config = GenerationConfig()  # greedy means greedy, whatever penalties the checkpoint suggests
        self.model = (model if places else model.to(self.device)).eval()
        self.rounds = cache is not None or self.checkpoint.rounds_activations

    @torch.inference_mode()
    def logits(self, ids: list[int], rounded: bool = True, prompt_len: int | None = None) -> torch.Tensor:
        """Float32 logits of every token, `[tokens, vocab]`, on the CPU; not `rounded`: from the weights alone.

        `prompt_len` of them are the prompt, which makes no difference to the models that `transformers` has.
        """
        self.model.rounds_activations = rounded
        options = {"past_key_values": fake_quantized_cache(self.cache)} if self.cache and rounded else {}
        return self.model(torch.tensor([ids], device=self.device), **options).logits[0].float().cpu()

    @torch.inference_mode()
    def hidden_states(self, ids: list[int]) -> torch.Tensor:
        """What the output product makes the logits of, `[tokens, hidden]`, in the model's dtype."""
        return self.model.base_model(torch.tensor([ids], device=self.device)).last_hidden_state[0]

    @torch.inference_mode()
    def generate(self, prompts: list[list[int]], max_output_len: int, eos_token_ids: tuple[int, ...]) -> list[Output]:
        """Greedy continuations. Raises `UserError` where logits are not finite."""
        outputs = []
        with item_bar(len(prompts), "Hugging Face baseline", "prompt") as bar:
            for i, prompt in enumerate(prompts):
                if not prompt:
                    raise UserError(f"prompt {i} is empty; give at least one token of text")
                ids = torch.tensor([prompt], device=self.device)
                result = self.model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_output_len,
                    do_sample=False,
                    eos_token_id=list(eos_token_ids) or None,
                    pad_token_id=eos_token_ids[0] if eos_token_ids else 0,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
                if not result.logits[-1].sum().isfinite():  # what is not finite stays in the cache
                    raise UserError(f"prompt {i}: logits of the baseline in {self.dtype} are not finite; use bfloat16")
                new = result.sequences[0, len(prompt) :].tolist()
                outputs.append(Output(new, "eos" if new[-1] in eos_token_ids else "length"))
                bar.update()
        return outputs

    def provenance(self, model: str) -> dict:
        """The same keys as an engine's; the sha256 is that of the first weights file."""
        return {
            "engine": "transformers",
            "model": model,
            "dtype": self.dtype,
            "engine_sha256": list(self.checkpoint.hashes.values())[1],  # after that of config.json
            "source_sha256": self.checkpoint.source_sha256,
            **({"gpus": self.gpus} if self.gpus > 1 else {}),
            **environment(self.device),
        }


def spread(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """How `from_pretrained` shall spread a model over the GPUs that torch sees; nothing where the first has room.

    Raises `UserError` where all of them have not.
    """
    needed = sum(map(math.prod, checkpoint.config.tensor_shapes().values())) * getattr(torch, dtype).itemsize
    free = [torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())]
    if needed <= ROOM * free[0]:
        return {}
    if needed > ROOM * sum(free):
        has = "the GPU has" if len(free) == 1 else f"the {len(free)} GPUs have"
        raise UserError(
            f"the baseline's weights take {needed / 1e9:.1f} GB in {dtype}, and {has} {sum(free) / 1e9:.1f} GB free; "
            "use more GPUs, a smaller baseline_dtype, or device cpu"
        )
    if importlib.util.find_spec("accelerate") is None:
        raise UserError(
            "the baseline is larger than one GPU, and accelerate, which spreads it over several, is not installed; "
            "'pip install trtbuild[workflow]' brings it"
        )
    return {"device_map": "auto", "max_memory": {i: int(ROOM * size) for i, size in enumerate(free)}}


def check_places(places: dict[str, int | str]) -> list[int | str]:
    """Where modules are; `UserError` where some found no GPU, which would be read from the disk in every step."""
    if left := [name for name, place in places.items() if place in ("cpu", "disk")]:
        raise UserError(
            f"the baseline would fit, but not in whole layers: there is no GPU with room for {left[0]}; "
            "use more GPUs, a smaller baseline_dtype, or device cpu"
        )
    return list(places.values())
