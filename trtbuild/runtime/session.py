"""A session: one engine, its KV cache, and the two kinds of step."""

import re
from abc import ABC, abstractmethod
from itertools import accumulate

import torch

from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine, StepContext
from trtbuild.errors import UserError
from trtbuild.network import Network
from trtbuild.runtime.kv_cache import KVCache

MIN_KV_STEP = 256


class Session(ABC):
    """Runs one batch at a time: `prefill` starts its sequences, every `decode` appends one token to each."""

    kind: str

    def __init__(self, network: Network, limits: BuildLimits, device: torch.device) -> None:
        self.limits, self.device = limits, device
        self.vocab_size = network.tensors["logits"].shape[1]
        self.weight_bytes = network.weight_bytes
        self._is_float16 = network.holds(torch.float16)
        self.cache = KVCache(network, limits.max_batch_size, device)

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]], all_logits: bool = False) -> torch.Tensor:
        """Starts new sequences from token ids; returns float32 logits of each last token, `[batch, vocab]`.

        With `all_logits` the logits of every token, packed: `[tokens, vocab]`, after `check_finite`; without, nothing
        waits for the device, and it is the caller's to check. Raises `UserError` for an empty prompt, one longer than
        `max_input_len`, or more than `max_batch_size` of them.
        """
        if not 0 < len(prompts) <= self.limits.max_batch_size:
            raise UserError(
                f"{len(prompts)} prompts in one batch; the engine's max_batch_size is {self.limits.max_batch_size}"
            )
        for i, prompt in enumerate(prompts):
            self.check_prompt(prompt, i)
        self.lengths = [len(prompt) for prompt in prompts]
        logits = self._prefill(prompts, all_logits)
        if all_logits:
            self.check_finite(prompts, logits)
        return logits

    def check_finite(self, prompts: list[list[int]], logits: torch.Tensor) -> None:
        """`UserError` where `logits`, or the prompts' keys in the cache, are not finite; waits for the device."""
        if not (logits.sum() + self.cache.sum_of_keys(len(prompts), max(map(len, prompts)))).isfinite():
            raise self.not_finite(prompts)

    def not_finite(self, prompts: list[list[int]]) -> UserError:
        """What to say of numbers that are NaN or infinite after these prompts. The prompts are run again to find where,
        and what is left of them in the cache is cleared.
        """
        where = self._where_not_finite(prompts)
        self.cache.clear()
        advice = "float16 ends at 65504, use bfloat16" if self._is_float16 else "the checkpoint's weights are damaged"
        return UserError(f"numbers are not finite {where}; {advice}")

    def _where_not_finite(self, prompts: list[list[int]]) -> str:
        """Where numbers stop being finite, as far as can be known."""
        return "in the logits"

    def check_prompt(self, prompt: list[int], index: int) -> None:
        """Raises `UserError` for a prompt that the engine cannot take."""
        if not prompt:
            raise UserError(f"prompt {index} is empty; give at least one token of text")
        if len(prompt) > self.limits.max_input_len:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, the engine's max_input_len is {self.limits.max_input_len}; "
                "shorten it or build with a larger --max-input-len"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise UserError(
                f"prompt {index} has the token {max(prompt)}, the engine's vocabulary has {self.vocab_size}; "
                "use the tokenizer of the engine's own checkpoint"
            )

    @torch.inference_mode()
    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token to every sequence (`[batch]` int32, on the session's device); returns `[batch, vocab]`.

        The result may be a buffer that the next step overwrites. Raises `UserError` when a cache is full.
        """
        if max(self.lengths) >= self.limits.max_length:
            raise UserError(
                f"a sequence has reached max_length {self.limits.max_length}; build with a larger max_output_len"
            )
        self.lengths = [n + 1 for n in self.lengths]
        return self._decode(tokens)

    @abstractmethod
    def _prefill(self, prompts: list[list[int]], all_logits: bool) -> torch.Tensor: ...

    @abstractmethod
    def _decode(self, tokens: torch.Tensor) -> torch.Tensor: ...


def packed_inputs(prompts: list[list[int]], all_logits: bool, device: torch.device) -> dict[str, torch.Tensor]:
    """The network's step inputs for new sequences, without their caches."""
    lengths = [len(prompt) for prompt in prompts]
    starts = [0, *accumulate(lengths)]
    rows = range(starts[-1]) if all_logits else [end - 1 for end in starts[1:]]
    values = {
        "input_ids": [token for prompt in prompts for token in prompt],
        "position_ids": [i for n in lengths for i in range(n)],
        "sequence_lengths": [n for n in lengths for _ in range(n)],
        "prompt_lengths": [n for n in lengths for _ in range(n)],
        "query_starts": starts,
        "past_lengths": [0] * len(prompts),
        "logits_indices": list(rows),
    }
    return {name: torch.tensor(value, dtype=torch.int32).to(device) for name, value in values.items()}


class PortableSession(Session):
    """Runs a portable engine. On CUDA every generation step is the replay of one captured graph."""

    kind = "portable"

    def __init__(self, engine: PortableEngine) -> None:
        super().__init__(engine.network, engine.limits, engine.device)
        self.engine = engine
        self._batches: dict[int, dict[str, torch.Tensor]] = {}
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}

    def _prefill(self, prompts: list[list[int]], all_logits: bool) -> torch.Tensor:
        inputs = packed_inputs(prompts, all_logits, self.device)
        batch = len(prompts)
        if batch not in self._batches:
            self._batches[batch] = self._decode_inputs(batch)
        self._decode_state = self._batches[batch]
        for name in ("position_ids", "prompt_lengths"):
            self._decode_state[name].copy_(inputs["query_starts"].diff())
        step = StepContext(self._decode_state["batch_index"], self.lengths, max(self.lengths))
        return self.engine.run(step, inputs | self.cache.views(batch))

    def _where_not_finite(self, prompts: list[list[int]]) -> str:
        self.lengths = [len(prompt) for prompt in prompts]
        try:
            with self.engine.checked():
                self._prefill(prompts, all_logits=False)
        except FloatingPointError as error:
            name = str(error)
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            return f"in layer {layer[1]}, from {name} on" if layer else f"from {name} on"
        return super()._where_not_finite(prompts)

    def _decode_inputs(self, batch: int) -> dict[str, torch.Tensor]:
        """The buffers that the generation steps of a batch size read; `position_ids` counts up by itself."""

        def integers(size: int) -> torch.Tensor:
            return torch.arange(size, dtype=torch.int32, device=self.device)

        positions = integers(batch)
        return {
            "input_ids": integers(batch),
            "position_ids": positions,
            "past_lengths": positions,
            "sequence_lengths": integers(batch),
            "prompt_lengths": integers(batch),
            "query_starts": integers(batch + 1),
            "logits_indices": integers(batch),
            "batch_index": torch.arange(batch, device=self.device),
            **self.cache.views(batch),
        }

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor:
        state, longest = self._decode_state, max(self.lengths)
        state["input_ids"].copy_(tokens)
        torch.add(state["position_ids"], 1, out=state["sequence_lengths"])
        if self.device.type == "cuda":
            logits = self._replay(len(self.lengths), kv_bound(longest, self.limits.max_length))
        else:
            step = StepContext(state["batch_index"], None, longest, exact=min(self.lengths) == longest)
            logits = self.engine.run(step, state)
        state["position_ids"].add_(1)
        return logits

    def _replay(self, batch: int, bound: int) -> torch.Tensor:
        """Replays the graph for a batch size and a number of cache positions, captured on first use."""
        if (batch, bound) not in self._graphs:
            state = self._decode_state

            def run() -> torch.Tensor:
                return self.engine.run(StepContext(state["batch_index"], None, bound), state)

            warm_up = torch.cuda.Stream()
            warm_up.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(warm_up):
                run()  # libraries allocate their workspaces; writes the same cache entries as the replay will
            torch.cuda.current_stream().wait_stream(warm_up)
            graph = torch.cuda.CUDAGraph()
            pool = next((g.pool() for g, _ in self._graphs.values()), None)
            with torch.cuda.graph(graph, pool=pool):
                logits = run()
            self._graphs[batch, bound] = graph, logits
        graph, logits = self._graphs[batch, bound]
        graph.replay()
        return logits


def kv_bound(length: int, max_length: int) -> int:
    """Cache positions a captured step reads: `length` rounded up, by 256 or an eighth, so that few graphs do."""
    step = max(MIN_KV_STEP, 1 << max(0, length.bit_length() - 4))
    return min(-(-length // step) * step, max_length)
