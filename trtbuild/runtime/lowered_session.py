"""Sessions over a lowered network: TensorRT's execution context on a GPU, or the interpreter on the CPU."""

from abc import abstractmethod
from itertools import accumulate
from pathlib import Path

import torch

from trtbuild.engine.config import BuildLimits
from trtbuild.engine.interpreter import Interpreter
from trtbuild.engine.tensorrt import TOKEN_INPUTS, LoweredNetwork
from trtbuild.engine.tensorrt_api import api, is_rtx, logger
from trtbuild.errors import UserError
from trtbuild.network import Network
from trtbuild.runtime.session import Session, packed_inputs

CONTEXT, GENERATION = 0, 1  # optimization profiles


class LoweredSession(Session):
    """Prepares the inputs that a lowered network has, packed or padded; `_execute` runs one step."""

    def __init__(self, network: Network, limits: BuildLimits, device: torch.device, packed: bool) -> None:
        super().__init__(network, limits, device)
        self.packed = packed

    @abstractmethod
    def _execute(self, inputs: dict[str, torch.Tensor], profile: int) -> torch.Tensor:
        """One step; updates the caches among `inputs` in place and returns the logits."""

    def _prefill(self, prompts: list[list[int]], all_logits: bool) -> torch.Tensor:
        inputs = context_inputs(prompts, all_logits, self.packed)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        self._prompt_lengths = self._positions = inputs["kv_lengths"].clone()
        return self._execute(inputs | self.cache.views(len(prompts)), CONTEXT)

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor:
        batch = len(self.lengths)
        rows = torch.arange(batch, dtype=torch.int32, device=self.device)
        shape = (batch,) if self.packed else (batch, 1)
        inputs = {
            "input_ids": tokens.reshape(shape),
            "position_ids": self._positions.reshape(shape),
            "sequence_lengths": (self._positions + 1).reshape(shape),
            "prompt_lengths": self._prompt_lengths.reshape(shape),
            "past_lengths": self._positions,
            "kv_lengths": self._positions + 1,
            "logits_indices": rows,
            "pad_index": rows[:, None],
            "unpad_index": rows,
        }
        logits = self._execute(inputs | self.cache.views(batch), GENERATION)
        self._positions = self._positions + 1
        return logits


def context_inputs(prompts: list[list[int]], all_logits: bool, packed: bool) -> dict[str, torch.Tensor]:
    """An engine's inputs for new sequences, on the host. Padding is on the right; what it computes is not used."""
    lengths = [len(prompt) for prompt in prompts]
    longest = max(lengths)
    starts = [0, *accumulate(lengths)]
    inputs = packed_inputs(prompts, all_logits, torch.device("cpu"))
    inputs["kv_lengths"] = torch.tensor(lengths, dtype=torch.int32)
    slots = torch.arange(longest, dtype=torch.int32)
    lasts = inputs["kv_lengths"][:, None] - 1
    # The packed row of every padded slot (padding repeats the last token), and the padded slot of every packed row.
    inputs["pad_index"] = torch.tensor(starts[:-1], dtype=torch.int32)[:, None] + torch.minimum(slots, lasts)
    inputs["unpad_index"] = torch.cat([b * longest + slots[:n] for b, n in enumerate(lengths)])
    if not packed:
        inputs["logits_indices"] = inputs["unpad_index"][inputs["logits_indices"]]
        for name in TOKEN_INPUTS:
            inputs[name] = inputs[name][inputs["pad_index"]]
    return inputs


class InterpretedSession(LoweredSession):
    """Runs the network definition that TensorRT would compile through the interpreter: slow, and needs no GPU."""

    kind = "interpreted"

    def __init__(self, network: Network, limits: BuildLimits, remove_input_padding: bool = True) -> None:
        super().__init__(network, limits, torch.device("cpu"), remove_input_padding)
        self.interpreter = Interpreter(LoweredNetwork(network, remove_input_padding))

    def _execute(self, inputs: dict[str, torch.Tensor], profile: int) -> torch.Tensor:
        outputs = self.interpreter.run(inputs)
        for name, cache in self.cache.views(len(self.lengths)).items():
            if is_quantized(cache):
                write_rows(cache, outputs[present(name)], inputs["past_lengths"])
            else:
                cache.copy_(outputs[present(name)])
        return outputs["logits"]


class TensorRTSession(LoweredSession):
    """Runs a serialized engine. Caches are updated in place: each present output is bound to its cache input.

    For 8-bit caches the engine returns this step's rows alone, and they are written here.
    """

    kind = "tensorrt"

    def __init__(self, path: Path, network: Network, limits: BuildLimits, remove_input_padding: bool) -> None:
        super().__init__(network, limits, torch.device("cuda"), remove_input_padding)
        self.runtime = api().Runtime(logger())
        self.engine = self.runtime.deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            kind = "TensorRT-RTX" if is_rtx() else "TensorRT"
            raise UserError(
                f"{path} was not accepted by {kind} {api().__version__} on {torch.cuda.get_device_name()}; "
                "build it for this GPU and version"
            )
        self.names = {self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)}
        self.contexts = []
        for profile in (CONTEXT, GENERATION):
            context = self.engine.create_execution_context()
            context.set_optimization_profile_async(profile, torch.cuda.current_stream().cuda_stream)
            self.contexts.append(context)

    def _execute(self, inputs: dict[str, torch.Tensor], profile: int) -> torch.Tensor:
        context = self.contexts[profile]
        held = {name: value.contiguous() for name, value in inputs.items() if name in self.names}
        rows: dict[str, torch.Tensor] = {}  # by cache input
        for name, value in held.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise UserError(f"the engine was not built for the shape {tuple(value.shape)} of its input {name}")
            context.set_tensor_address(name, value.data_ptr())
            if present(name) in self.names:
                if is_quantized(value):
                    batch, heads, _, width = value.shape
                    value = rows[name] = value.new_empty(batch, heads, inputs["pad_index"].shape[1], width)
                context.set_tensor_address(present(name), value.data_ptr())
        logits = torch.empty(len(inputs["logits_indices"]), self.vocab_size, dtype=torch.float32, device=self.device)
        context.set_tensor_address("logits", logits.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT failed to enqueue a step; its messages are above")
        for name, value in rows.items():
            write_rows(held[name], value, held["past_lengths"])
        return logits


def present(cache_input: str) -> str:
    """Name of the output that updates a cache input: `key_cache.3` gives `present_key.3`."""
    kind, _, layer = cache_input.partition("_cache.")
    return f"present_{kind}.{layer}"


def is_quantized(cache: torch.Tensor) -> bool:
    return cache.dtype.itemsize == 1


def write_rows(cache: torch.Tensor, rows: torch.Tensor, past_lengths: torch.Tensor) -> None:
    """Writes `[batch, kv_heads, query_len, head_dim]` into each sequence's cache from its past length on."""
    positions = past_lengths[:, None] + torch.arange(rows.shape[2], dtype=torch.int32, device=rows.device)
    sequences = torch.arange(len(rows), device=rows.device)[:, None]
    # As integers, because torch does not index float8 everywhere.
    cache.view(torch.int8)[sequences, :, positions] = rows.view(torch.int8).transpose(1, 2)
