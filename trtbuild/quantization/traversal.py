"""Running calibration samples through the decoder, layer by layer, stopping before every product.

At a stop all samples have arrived, so that a product's weight can be chosen from all its inputs, and its outputs be
computed with what was chosen. Memory: one layer's weights, and what is alive at a stop: hidden states and one input.
"""

from collections.abc import Callable, Iterator

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import LayerInputs, decoder_layer, embedding
from trtbuild.linear.dense import DenseLinear
from trtbuild.linear.linear import linear
from trtbuild.network import Network, Node, Tensor, ops
from trtbuild.network.step import Step, step_tensors, whole_prompts

Values = dict[str, torch.Tensor]
GPU_BATCH_TOKENS = 16384  # on a CPU a batch is one sample, which is what its threads share out


class Stop:
    """All samples at a product: its name, its weight `[out, in]` (assign another), its inputs, `[tokens, in]` each."""

    def __init__(self, name: str, weight: torch.Tensor, inputs: list[torch.Tensor]) -> None:
        self.name, self.weight, self.inputs = name, weight, inputs


class Traversal:
    """Samples, token ids each, on their way through a checkpoint's decoder. `map_` shares out the work.

    `observe(layer, node, inputs, outputs)`, if given, is called in a worker for every operation, with the name of its
    layer and its inputs by parameter, and returns what to keep of it; for equal names the larger values are kept, in
    `observed`.

    Computes in float32 on a CPU, in the checkpoint's own dtype on a GPU. Quantized weights are widened.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        samples: list[list[int]],
        device: torch.device,
        map_: Callable,
        observe: Callable[[str, Node, Values, tuple[torch.Tensor, ...]], Values] | None = None,
    ) -> None:
        self.config, self.device, self.map, self.observe = checkpoint.config, device, map_, observe
        self.weights = checkpoint.dequantized
        self.dtype = torch.float32 if device.type == "cpu" else self.weights("model.embed_tokens.weight").dtype
        self.max_length = max(len(sample) for sample in samples)
        self.observed: Values = {}
        network = Network()
        hidden, self._shared = embedding(network, self.config, self.weights, self.dtype, self.max_length)
        self._constants = network.constants
        self._batches = [_Batch(batch, network.inputs, device) for batch in _batches(samples, device)]
        made = {name for node in network.nodes for name in node.outputs}
        outputs = {x.name: x.name for x in vars(self._shared).values() if x and x.name in made}
        outputs["hidden"] = hidden.name
        for _ in self._run("model", network, outputs):
            raise AssertionError("an embedding has no products")

    def layer(self, i: int) -> Iterator[Stop]:
        """Runs layer `i`, yielding at each of its products in order."""
        network = Network()
        hidden, inputs = self._inputs(network)
        hidden, _ = decoder_layer(self.config, self.weights, i, hidden, inputs)
        yield from self._run(f"model.layers.{i}", network, {"hidden": hidden.name})

    def head(self) -> Iterator[Stop]:
        """Runs the final normalization, yielding at the output product."""
        network = Network()
        hidden, _ = self._inputs(network)
        norm = network.constant("model.norm.weight", self.weights("model.norm.weight").to(self.dtype))
        x = ops.rms_norm(hidden, norm, self.config.rms_norm_eps)
        linear(x, "lm_head", [self.weights(f"{self.config.output_product}.weight")])
        yield from self._run("model", network, {})

    def _inputs(self, network: Network) -> tuple[Tensor, LayerInputs]:
        """What a layer's network reads, with the names that `_Batch.values` has."""

        def known(x: Tensor) -> Tensor:
            if x.name in self._constants:
                return network.constant(x.name, self._constants[x.name])
            return network.input(x.name, x.dtype, x.shape)

        hidden = network.input("hidden", self.dtype, ("tokens", self.config.hidden_size))
        return hidden, LayerInputs(**{name: x and known(x) for name, x in vars(self._shared).items()})

    def _run(self, layer: str, network: Network, outputs: dict[str, str]) -> Iterator[Stop]:
        """Runs all batches through a network, one stretch between products at a time; keeps `outputs` in them."""
        constants = {name: constant.load().to(self.device) for name, constant in network.constants.items()}
        last_uses = network.last_uses() | dict.fromkeys(outputs.values(), len(network.nodes))

        def stretch(batch: "_Batch", nodes: range) -> Values:
            """Runs `nodes` for one batch, forgetting what no later one reads; returns what was observed."""
            step = batch.step()
            observed: Values = {}
            for i in nodes:
                node = network.nodes[i]
                known = constants | batch.values | batch.live
                inputs = {parameter: known[name] for parameter, name in node.inputs.items()}
                result = node.op.portable(step, **inputs)
                result = result if isinstance(result, tuple) else (result,)
                if self.observe:
                    observed |= self.observe(layer, node, inputs, result)
                batch.live |= zip(node.outputs, result, strict=True)
                batch.live = {name: value for name, value in batch.live.items() if last_uses.get(name, -1) > i}
            return observed

        def run(nodes: range) -> None:
            for observed in self.map(lambda batch: stretch(batch, nodes), self._batches):
                for name, value in observed.items():
                    known = self.observed.get(name)
                    self.observed[name] = value if known is None else torch.maximum(known, value)

        start = 0
        for i, node in enumerate(network.nodes):
            if isinstance(node.op, DenseLinear):
                run(range(start, i))
                start = i
                x, weight = node.inputs["x"], node.inputs["weight"]
                inputs = [(batch.values | batch.live)[x] for batch in self._batches]
                stop = Stop(weight.removesuffix(".weight"), constants[weight], inputs)
                yield stop
                constants[weight] = stop.weight
                del inputs, stop
        run(range(start, len(network.nodes)))
        for batch in self._batches:
            batch.values |= {name: batch.live[tensor] for name, tensor in outputs.items()}
            batch.live = {}


class _Batch:
    """Some samples: `values` by input name of a layer, and what is `live` within the layer that runs."""

    def __init__(self, samples: list[list[int]], names: list[str], device: torch.device) -> None:
        self.chunks = whole_prompts(samples)
        self.values: Values = step_tensors(self.chunks, names, device)
        self.live: Values = {}

    def step(self) -> Step:
        """A new one for every stretch: what it makes once, such as ALiBi's biases, is not kept for all batches."""
        return Step.of_chunks(self.chunks)


def _batches(samples: list[list[int]], device: torch.device) -> Iterator[list[list[int]]]:
    batch: list[list[int]] = []
    for sample in samples:
        full = sum(map(len, batch)) + len(sample) > GPU_BATCH_TOKENS
        if batch and (device.type == "cpu" or full):
            yield batch
            batch = []
        batch.append(sample)
    yield batch
