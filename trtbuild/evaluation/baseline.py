"""What every engine is compared with: `transformers`' model where it has one, elsewhere our own engine in float32."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.evaluation.provenance import environment
from trtbuild.models.config import ModelConfig
from trtbuild.network import Network
from trtbuild.runtime.generation import Output, generate
from trtbuild.runtime.open import pick_device
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession


def missing_in_transformers(config: ModelConfig, max_input_len: int, max_output_len: int) -> str | None:
    """What the `transformers` class of a canonical checkpoint does not compute, for prompts and outputs that long."""
    if config.rope is None:
        return "ALiBi"
    if config.rope.type == "qwen" and max_input_len > config.rope.original_max_position_embeddings:
        return f"Qwen's dynamic NTK beyond {config.rope.original_max_position_embeddings} tokens"
    if 0 < config.logn_length < max_input_len + max_output_len:
        return f"log-n attention beyond {config.logn_length} tokens"
    return None


def open_baseline(
    folder: Path | str,
    dtype: str = "float32",
    device: str = "auto",
    cache: CacheScales | None = None,
    max_input_len: int = 1024,
    max_output_len: int = 0,
) -> "Baseline":
    """The baseline of a checkpoint, for prompts and outputs of up to so many tokens."""
    missing = missing_in_transformers(Checkpoint(folder).config, max_input_len, max_output_len)
    if missing is None:
        return HuggingFaceModel(folder, dtype, device, cache)
    limits = BuildLimits(1, max_input_len, max(1, max_output_len))
    return PortableBaseline(folder, dtype, device, cache, limits, f"transformers has no {missing}")


def without_output_product(network: Network, product: str) -> Network:
    """The network of what is multiplied to make the logits, whose name it takes."""
    last = max(i for i, node in enumerate(network.nodes) if f"{product}.weight" in node.inputs.values())
    hidden = network.nodes[last].inputs["x"]
    nodes = [
        replace(node, outputs=("logits",) if node.outputs == (hidden,) else node.outputs) for node in network.nodes
    ]
    return network.with_nodes(nodes[:last])


class PortableBaseline:
    """A checkpoint in a portable engine, mostly in float32, one prompt at a time; otherwise like `HuggingFaceModel`.

    `reason` says why it stands in for `transformers`, and is recorded in what it produces.
    """

    name = "portable engine"

    def __init__(
        self,
        folder: Path | str,
        dtype: str,
        device: str,
        cache: CacheScales | None,
        limits: BuildLimits,
        reason: str,
    ) -> None:
        self.checkpoint, self.dtype, self.device, self.cache = Checkpoint(folder), dtype, pick_device(device), cache
        self.limits, self.reason = limits, reason
        self.rounds = cache is not None or self.checkpoint.rounds_activations
        self._open: tuple[tuple[bool, bool], PortableSession] | None = None

    def session(self, rounded: bool = True, headless: bool = False) -> PortableSession:
        """Of a quantized model either as it is, or with the numbers that its weights mean and nothing rounded.

        `headless`: in the place of logits it has what the output product makes them of. One session is held at a time.
        """
        if self._open is None or self._open[0] != (rounded, headless):
            self._open = None  # before the other is loaded
            weights = self.checkpoint.__getitem__ if rounded else self.checkpoint.dequantized
            cache = self.cache if rounded else None
            dtype = getattr(torch, self.dtype)
            network = decoder(self.checkpoint.config, weights, dtype, self.limits.max_length, cache)
            if headless:
                network = without_output_product(network, self.checkpoint.config.output_product)
            self._open = (rounded, headless), PortableSession(PortableEngine(network, self.limits, self.device))
        return self._open[1]

    @torch.inference_mode()
    def logits(self, ids: list[int], rounded: bool = True, prompt_len: int | None = None) -> torch.Tensor:
        """Float32 logits of every token, `[tokens, vocab]`, on the CPU; not `rounded`: from the weights alone.

        The first `prompt_len` tokens (default: all) are the prompt, by whose length Qwen chooses its RoPE base.
        """
        session = self.session(rounded)
        rows = [session.prefill([ids[:prompt_len]], all_logits=True).float().cpu()]
        for token in ids[len(rows[0]) :]:
            rows.append(session.decode(torch.tensor([token], dtype=torch.int32, device=self.device)).float().cpu())
        return torch.cat(rows)

    @torch.inference_mode()
    def hidden_states(self, ids: list[int]) -> torch.Tensor:
        """As `HuggingFaceModel.hidden_states`."""
        return self.session(headless=True).prefill([ids], all_logits=True)

    def generate(self, prompts: list[list[int]], params: SamplingParams, **watch: Callable) -> list[Output]:
        """As `generate` of the runtime."""
        return generate(self.session(), prompts, params, **watch)

    def provenance(self, model: str) -> dict:
        """The same keys as `HuggingFaceModel`'s, and `baseline`: why it is not that."""
        return {
            "engine": "portable",
            "baseline": self.reason,
            "model": model,
            "dtype": self.dtype,
            "engine_sha256": list(self.checkpoint.hashes.values())[1],  # after that of config.json
            "source_sha256": self.checkpoint.source_sha256,
            **environment(self.device),
        }


Baseline = HuggingFaceModel | PortableBaseline
