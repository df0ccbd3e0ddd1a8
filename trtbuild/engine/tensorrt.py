"""A network as an `INetworkDefinition`, and that as a serialized TensorRT engine."""

import torch

from trtbuild.engine.config import BuildLimits
from trtbuild.engine.lowering import Lowering
from trtbuild.engine.tensorrt_api import api, logger, set_target
from trtbuild.errors import UserError
from trtbuild.network import Network
from trtbuild.progress import item_bar

TOKEN_INPUTS = ("input_ids", "position_ids", "sequence_lengths", "prompt_lengths")  # one number a token


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

    def _inputs(self, network: Network) -> dict[str, object]:
        """Adds the engine's inputs; returns what stands for each of the network's.

        The engine has `pad_index`, `unpad_index` (packed) and `kv_lengths` in the place of `query_starts`.
        """
        lowering, packed = self.lowering, self.lowering.packed
        tokens = (-1,) if packed else (-1, -1)
        names = [name for name in network.inputs if name != "query_starts"]
        inputs = {
            name: (
                network.tensors[name].dtype,
                tuple(-1 if isinstance(n, str) else n for n in network.tensors[name].shape),
            )
            for name in names
        }
        inputs |= {name: (torch.int32, tokens) for name in TOKEN_INPUTS if name in inputs}
        inputs["kv_lengths"] = (torch.int32, (-1,))
        if packed:
            inputs |= {"pad_index": (torch.int32, (-1, -1)), "unpad_index": (torch.int32, (-1,))}
        for name, (dtype, shape) in inputs.items():
            lowering.inputs[name] = self.definition.add_input(name, lowering.dtype(dtype), shape)
        tensors = {name: lowering.inputs[name] for name in names}
        if not packed:
            for name in TOKEN_INPUTS:
                if name in tensors:
                    tensors[name] = lowering.reshape(tensors[name], (-1,))
        return tensors

    def build(self, limits: BuildLimits, compute_capabilities: list[str] | None) -> memoryview:
        """Compiles the engine with two profiles: 0 context, 1 generation. Raises `UserError` on failure."""
        trt = api()
        config = self.builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 means float32
        set_target(config, compute_capabilities, self.fp8)
        for generation in (False, True):
            profile = self.builder.create_optimization_profile()
            for name, tensor in self.lowering.inputs.items():
                profile.set_shape(
                    name, *profile_shapes(name, tuple(tensor.shape), limits, self.lowering.packed, generation)
                )
            config.add_optimization_profile(profile)
        config.progress_monitor = _progress_monitor()
        engine = self.builder.build_serialized_network(self.definition, config)
        if engine is None:
            raise UserError("TensorRT could not build the engine; its messages are above")
        return memoryview(engine)


def profile_shapes(
    name: str, shape: tuple[int, ...], limits: BuildLimits, packed: bool, generation: bool
) -> list[tuple[int, ...]]:
    """Smallest, typical and largest shape of an engine input in one of the two profiles."""
    batches = (1, max(1, limits.max_batch_size // 2), limits.max_batch_size)
    queries = (1, 1, 1) if generation else (1, max(1, limits.max_input_len // 2), limits.max_input_len)
    tokens = tuple(b * q for b, q in zip(batches, queries, strict=True))
    # A whole prompt's logits can be asked for (perplexity), or the last ones of every sequence.
    rows = batches if generation else (1, batches[1], max(limits.max_batch_size, limits.max_input_len))
    if name == "logits_indices":
        return [(n,) for n in rows]
    if name == "pad_index" or (len(shape) == 2 and not packed):
        return list(zip(batches, queries, strict=True))
    if name in (*TOKEN_INPUTS, "unpad_index"):
        return [(n,) for n in tokens]
    return [(n, *shape[1:]) for n in batches]


def _progress_monitor():
    """Shows the builder's outermost phases as progress bars. (The base class exists only with a distribution.)"""

    class Monitor(api().IProgressMonitor):
        def __init__(self) -> None:
            super().__init__()
            self.bars: dict[str, object] = {}

        def phase_start(self, phase_name, parent_phase, num_steps) -> None:
            if parent_phase is None:
                self.bars[phase_name] = item_bar(num_steps, phase_name, "step")

        def phase_finish(self, phase_name) -> None:
            if bar := self.bars.pop(phase_name, None):
                bar.close()

        def step_complete(self, phase_name, step) -> bool:
            if bar := self.bars.get(phase_name):
                bar.update()
            return True

    return Monitor()
