"""A network as an `INetworkDefinition`, and that as a serialized TensorRT engine."""

from typing import Any

import torch

from trtbuild.engine.config import BuildLimits
from trtbuild.engine.lowering import RECEIVED, SENT, Lowering
from trtbuild.engine.tensorrt_api import api, logger, set_target
from trtbuild.errors import UserError
from trtbuild.network import Network
from trtbuild.network.lowering import Lowered
from trtbuild.network.network import Shape
from trtbuild.network.step import STEP_INPUTS
from trtbuild.progress import item_bar

PADDING = ("pad_index", "unpad_index")
PADDED = ("batch", "query_len")


class LoweredNetwork:
    """An `INetworkDefinition` with all that must live as long as it does."""

    def __init__(self, network: Network, remove_input_padding: bool) -> None:
        trt = api()
        self.builder = trt.Builder(logger())
        flag = trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED
        self.definition = self.builder.create_network(1 << int(flag))
        self.lowering = Lowering(self.definition, remove_input_padding)
        self.fp8 = network.holds(torch.float8_e4m3fn)
        tensors = self._inputs(network)
        for name, constant in network.constants.items():
            tensors[name] = self.lowering.constant(constant.load(), name)
        for node in network.nodes:
            inputs = {parameter: tensors.get(name) for parameter, name in node.inputs.items()}
            outputs = node.op.to_tensorrt(self.lowering, **inputs)
            tensors |= zip(node.outputs, outputs if isinstance(outputs, tuple) else (outputs,), strict=True)
        for name in network.outputs:
            tensors[name].name = name
            self.definition.mark_output(tensors[name])
        if self.lowering.sent is not None:
            self.lowering.sent.name = SENT
            self.definition.mark_output(self.lowering.sent)
        if received := self.lowering.inputs.get(RECEIVED):
            self.shapes[RECEIVED] = ("tokens", received.shape[1])

    def _inputs(self, network: Network) -> dict[str, Lowered]:
        """Adds the engine's inputs; returns what stands for each of the network's."""
        lowering = self.lowering
        self.shapes = lowered_shapes(network, lowering.packed)
        for name, shape in self.shapes.items():
            dtype = network.tensors[name].dtype if name in network.inputs else torch.int32
            sizes = tuple(-1 if isinstance(size, str) else size for size in shape)
            lowering.inputs[name] = self.definition.add_input(name, lowering.dtype(dtype), sizes)
        tensors = {name: x for name, x in lowering.inputs.items() if name in network.inputs}
        padded = {name: lowering.reshape(x, (-1,)) for name, x in tensors.items() if self.shapes[name] == PADDED}
        return tensors | padded

    def build(self, limits: BuildLimits, compute_capabilities: list[str] | None) -> memoryview:
        """Compiles the engine with two profiles: 0 context, 1 generation. Raises `UserError` on failure."""
        trt = api()
        config = self.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
        set_target(config, compute_capabilities, self.fp8)
        for generation in (False, True):
            profile = self.builder.create_optimization_profile()
            for name, shape in self.shapes.items():
                profile.set_shape(name, *profile_shapes(shape, limits, generation))
            config.add_optimization_profile(profile)
        config.progress_monitor = _progress_monitor()
        engine = self.builder.build_serialized_network(self.definition, config)
        if engine is None:
            raise UserError("TensorRT could not build the engine; its messages are above")
        return memoryview(engine)


def lowered_shapes(network: Network, packed: bool) -> dict[str, Shape]:
    """The shapes of a lowered network's inputs.

    It has `kv_lengths` and, packed, `pad_index` and `unpad_index` in the place of `query_starts`. Without packing, what
    has a number a token has one a padded place.
    """
    shapes = {name: network.tensors[name].shape for name in network.inputs if name != "query_starts"}
    shapes |= {name: STEP_INPUTS[name].shape for name in ("kv_lengths", *(PADDING if packed else ()))}
    return shapes if packed else {name: PADDED if n == ("tokens",) else n for name, n in shapes.items()}


def profile_shapes(shape: Shape, limits: BuildLimits, generation: bool) -> list[tuple[int, ...]]:
    """Smallest, typical and largest shape of an engine input in one of the two profiles."""
    batches = (1, max(1, limits.max_batch_size // 2), limits.max_batch_size)
    queries = (1, 1, 1) if generation else (1, max(1, limits.max_input_len // 2), limits.max_input_len)
    sizes = {
        "batch": batches,
        "query_len": queries,
        "tokens": tuple(b * q for b, q in zip(batches, queries, strict=True)),
        # A whole prompt's logits can be asked for (perplexity), or the last ones of every sequence.
        "rows": batches if generation else (1, batches[1], max(limits.max_batch_size, limits.max_input_len)),
    }
    return [tuple(sizes[n][i] if isinstance(n, str) else n for n in shape) for i in range(3)]


def _progress_monitor() -> Any:
    """Shows the builder's outermost phases as progress bars. (The base class exists only with a distribution.)"""

    class Monitor(api().IProgressMonitor):  # type: ignore[misc]  # for mypy no class
        def __init__(self) -> None:
            super().__init__()
            self.bars: dict[str, Any] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                self.bars[phase_name] = item_bar(num_steps, phase_name, "step")

        def phase_finish(self, phase_name: str) -> None:
            if bar := self.bars.pop(phase_name, None):
                bar.close()

        def step_complete(self, phase_name: str, step: int) -> bool:
            if bar := self.bars.get(phase_name):
                bar.update()
            return True

    return Monitor()
