"""The Hugging Face model of a canonical checkpoint: the baseline that every engine is compared with."""

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import CacheScales
from trtbuild.errors import UserError
from trtbuild.evaluation.fake_quantized import fake_quantized_cache, load_model
from trtbuild.evaluation.provenance import environment
from trtbuild.progress import byte_bar
from trtbuild.runtime.generation import OnOutput, Output
from trtbuild.runtime.open import pick_device
from trtbuild.runtime.sampling import SamplingParams

ROOM = 0.9  # of a GPU's free memory for weights; the rest is for what is computed with them
CACHES = 0.5  # of what is free besides weights for keys and values, which each step copies


class HuggingFaceModel:
    """`transformers`' model in a dtype.

    Its batches pad, which moves last bits: what it generates is computed in batches, logits a prompt at a time.

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
        with byte_bar(size := bytes_of_weights(self.checkpoint, dtype), "the Hugging Face model") as bar:
            model = load_model(self.checkpoint, getattr(torch, dtype), **places)
            self.gpus = len({*check_places(model.hf_device_map)}) if places else 1
            self.model = (model if places else model.to(self.device)).eval()
            bar.update(size)  # at its end alone, but until then it says for how long
        model.generation_config = GenerationConfig()  # greedy means greedy, whatever penalties the checkpoint suggests
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
    def generate(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        on_token: Callable[[int, int], object] = lambda prompt, token: None,
        on_output: OnOutput = lambda index, output: None,
        say: Callable[[str], object] = lambda line: None,
    ) -> list[Output]:
        """Greedy continuations; `params` say how long, and where they end. Raises `UserError` where logits are not
        finite.

        Prompts that are about as long are a batch. `on_token`, `on_output` and `say` are as the runtime's.
        """
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise UserError(f"prompt {i} is empty; give at least one token of text")
        outputs: dict[int, Output] = {}
        for batch in self._batches([len(prompt) + params.max_output_len for prompt in prompts]):
            say(f"batch {len(batch)}")
            for i, output in zip(batch, self._generate_batch(batch, prompts, params, on_token), strict=True):
                outputs[i] = output
                on_output(i, output)
        return [outputs[i] for i in range(len(prompts))]

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """The longest first, so that what has no room has none at once."""
        config = self.checkpoint.config
        dtype = getattr(torch, self.dtype)
        position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
        if self.device.type == "cuda":
            most, room = 64, CACHES * sum(torch.cuda.mem_get_info(i)[0] for i in range(self.gpus))
        else:  # what the weights took as they were read, which is free again
            most, room = 8, 2 * config.parameters
        left = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        while left:
            size = max(1, min(most, int(room // (lengths[left[0]] * position))))
            yield left[:size]
            del left[:size]

    def _generate_batch(
        self, batch: list[int], prompts: list[list[int]], params: SamplingParams, on_token: Callable[[int, int], object]
    ) -> Iterator[Output]:
        longest = max(len(prompts[i]) for i in batch)
        ends = params.eos_token_ids
        ids = torch.full((len(batch), longest), ends[0] if ends else 0)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(batch):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        finite = torch.ones(len(batch), dtype=torch.bool, device=self.device)

        def watch(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            finite.copy_(logits.sum(1).isfinite())  # what is not finite stays in the cache: the last step tells
            for i in batch:
                on_token(i, 0)
            return logits

        from transformers import LogitsProcessorList

        result = self.model.generate(
            ids.to(self.device),
            attention_mask=mask.to(self.device),
            max_new_tokens=params.max_output_len,
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=ends[0] if ends else 0,
            logits_processor=LogitsProcessorList([watch]),
        )
        if not finite.all():
            i = batch[int(finite.int().argmin())]
            raise UserError(f"prompt {i}: logits of the baseline in {self.dtype} are not finite; use bfloat16")
        for new in result[:, longest:].tolist():
            end = next((n for n, token in enumerate(new, 1) if token in ends), None)
            yield Output(new[:end], "length" if end is None else "eos")

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


def bytes_of_weights(checkpoint: Checkpoint, dtype: str) -> int:
    return sum(map(math.prod, checkpoint.config.tensor_shapes().values())) * getattr(torch, dtype).itemsize


def spread(checkpoint: Checkpoint, dtype: str) -> dict[str, Any]:
    """How `from_pretrained` shall spread a model over the GPUs that torch sees; nothing where the first has room.

    Raises `UserError` where all of them have not.
    """
    needed = bytes_of_weights(checkpoint, dtype)
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
