"""Sessions over a lowered network: TensorRT's execution context on a GPU, or the interpreter on the CPU."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch

from trtbuild.engine.config import BuildLimits
from trtbuild.engine.interpreter import Interpreter
from trtbuild.engine.tensorrt import LoweredNetwork
from trtbuild.engine.tensorrt_api import api, is_rtx, logger
from trtbuild.errors import UserError
from trtbuild.network import Network
from trtbuild.network.step import STEP_INPUTS, Chunk, step_tensors
from trtbuild.runtime.session import Session

CONTEXT, GENERATION = 0, 1  # optimization profiles
Tensors = dict[str, torch.Tensor]


class LoweredSession(Session):
    """Prepares the inputs that a lowered network has, packed or padded; `_execute` runs one step."""

    def __init__(self, network: Network, limits: BuildLimits, device: torch.device, packed: bool) -> None:
        super().__init__(network, limits, device)
        self.packed, self.states = packed, network.states
        self._layouts: dict[int, Tensors] = {}  # of a generation step, by batch size

    @abstractmethod
    def _execute(self, inputs: Tensors, caches: Tensors, profile: int) -> torch.Tensor:
        """One step; updates `caches` in place and returns the logits."""

    def _step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        ends = torch.tensor([self.lengths, self.prompt_lengths], dtype=torch.int32).to(self.device)
        self._positions, self._prompt_lengths = ends
        longest = max(len(chunk.tokens) for chunk in chunks)
        neighbours = [chunk.slot for chunk in chunks] == [chunks[0].slot + i for i in range(len(chunks))]
        # A padded row's keys are written as well, where the sequence's next ones will be: they must fit.
        if neighbours and all(chunk.past + longest <= self.limits.max_length for chunk in chunks):
            return self._run(chunks)
        return torch.cat([self._run([chunk]) for chunk in chunks])

    def _run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """A step of neighbouring slots."""
        inputs = lowered_inputs(chunks, self.packed)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        return self._execute(inputs, self.cache.views(len(chunks), chunks[0].slot), CONTEXT)

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor:
        batch = len(self.lengths)
        if batch not in self._layouts:
            ones = lowered_inputs([Chunk([0], 1, slot=slot) for slot in range(batch)], self.packed)
            self._layouts[batch] = {name: value.to(self.device) for name, value in ones.items()}
        ends = self._positions + 1
        values = {
            "input_ids": tokens,
            "position_ids": self._positions,
            "sequence_lengths": ends,
            "prompt_lengths": self._prompt_lengths,
            "past_lengths": self._positions,
            "kv_lengths": ends,
        }
        layout = self._layouts[batch]
        inputs = layout | {name: value.view_as(layout[name]) for name, value in values.items()}
        logits = self._execute(inputs, self.cache.views(batch), GENERATION)
        self._positions = ends
        return logits


def lowered_inputs(chunks: Sequence[Chunk], packed: bool) -> dict[str, torch.Tensor]:
    """A lowered network's inputs, on the host. Padding is on the right; what it computes is not used."""
    inputs = step_tensors(chunks, STEP_INPUTS)
    if not packed:
        inputs["logits_indices"] = inputs["unpad_index"][inputs["logits_indices"]]
        for name, known in STEP_INPUTS.items():
            if known.shape == ("tokens",) and name != "unpad_index":
                inputs[name] = inputs[name][inputs["pad_index"]]
    return inputs


class InterpretedSession(LoweredSession):
    """Runs the network definition that TensorRT would compile through the interpreter: slow, and needs no GPU."""

    kind = "interpreted"

    def __init__(self, network: Network, limits: BuildLimits, remove_input_padding: bool = True) -> None:
        super().__init__(network, limits, torch.device("cpu"), remove_input_padding)
        self.interpreter = Interpreter(LoweredNetwork(network, remove_input_padding))

    def _execute(self, inputs: Tensors, caches: Tensors, profile: int) -> torch.Tensor:
        outputs = self.interpreter.run(inputs | caches)
        for name, cache in caches.items():
            if is_quantized(cache):
                write_rows(cache, outputs[self.states[name]], inputs["past_lengths"])
            else:
                cache.copy_(outputs[self.states[name]])
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

    def _execute(self, inputs: Tensors, caches: Tensors, profile: int) -> torch.Tensor:
        context = self.contexts[profile]
        held = {name: value.contiguous() for name, value in (inputs | caches).items() if name in self.names}
        rows: dict[str, torch.Tensor] = {}  # by cache input
        for name, value in held.items():
            if not context.set_input_shape(name, tuple(value.shape)):
                raise UserError(f"the engine was not built for the shape {tuple(value.shape)} of its input {name}")
            context.set_tensor_address(name, value.data_ptr())
            if self.states.get(name) in self.names:
                if is_quantized(value):
                    batch, heads, _, width = value.shape
                    value = rows[name] = value.new_empty(batch, heads, inputs["pad_index"].shape[1], width)
                context.set_tensor_address(self.states[name], value.data_ptr())
        logits = torch.empty(len(inputs["logits_indices"]), self.vocab_size, dtype=torch.float32, device=self.device)
        context.set_tensor_address("logits", logits.data_ptr())
        if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise RuntimeError("TensorRT failed to enqueue a step; its messages are above")
        for name, value in rows.items():
            write_rows(held[name], value, held["past_lengths"])
        return logits


def is_quantized(cache: torch.Tensor) -> bool:
    return cache.dtype.itemsize == 1


def write_rows(cache: torch.Tensor, rows: torch.Tensor, past_lengths: torch.Tensor) -> None:
    """Writes `[batch, kv_heads, query_len, head_dim]` into each sequence's cache from its past length on."""
    positions = past_lengths[:, None] + torch.arange(rows.shape[2], dtype=torch.int32, device=rows.device)
    sequences = torch.arange(len(rows), device=rows.device)[:, None]
    # As integers, because torch does not index float8 everywhere.
    cache.view(torch.int8)[sequences, :, positions] = rows.view(torch.int8).transpose(1, 2)
