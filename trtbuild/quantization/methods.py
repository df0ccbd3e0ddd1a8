"""How weights are rounded: to nearest (with SmoothQuant), by GPTQ, by AWQ. Each gives one layer's numbers at a time."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.errors import UserError
from trtbuild.linear.int4 import Int4Grid, Int4Linear
from trtbuild.models.config import PRODUCTS
from trtbuild.quantization import awq
from trtbuild.quantization.calibration import Calibration
from trtbuild.quantization.gptq import gptq, inverse_cholesky
from trtbuild.quantization.layer import LayerWeights, finite
from trtbuild.quantization.recipe import Quantization
from trtbuild.quantization.smoothquant import smoothing_scales
from trtbuild.quantization.traversal import Stop, Traversal
from trtbuild.tensors.lazy import fitted
from trtbuild.tensors.rounding import scale_for

ROWS = 512  # of a weight, one thread's piece of work; fixed, so that results do not depend on the threads


@dataclass(frozen=True)
class Rounded:
    """A projection's numbers on the CPU, in the dtypes of `QuantizedWeight`, and their `relative_error`."""

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    input_scale: torch.Tensor | None
    error: float


Layer = dict[str, Rounded | torch.Tensor]  # by projection; what stays in 16 bits, by tensor


class Round:
    """To nearest, with smoothed activations where the recipe says so.

    `ranges` and `samples` (token ids) are there where the recipe needs them; `map_` shares out work.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        quantization: Quantization,
        ranges: Calibration | None,
        samples: list[list[int]] | None,
        device: torch.device,
        map_: Callable,
    ) -> None:
        self.checkpoint, self.quantization, self.ranges = checkpoint, quantization, ranges
        self.samples, self.device, self.map = samples, device, map_
        self.format, self.options = quantization.format, quantization.weights
        self.dtype = getattr(torch, quantization.dtype)
        self.smoothing: dict[str, torch.Tensor] = {}  # by product, what `LayerWeights.smooth` was given

    def layer(self, i: int) -> Layer:
        """All of layer `i`, by names within it."""
        layer, products = LayerWeights(self.checkpoint, i, self.device), self.products(i)
        inputs = self._input_ranges(f"model.layers.{i}.{product}" for product in products)
        activations = self.quantization.activations
        if activations and activations.smoothquant is not None:
            for product in products:
                columns = layer.reduce(product, layer.weights[product].abs().amax(0))
                name = f"model.layers.{i}.{product}"
                channels = layer.reduce(product, inputs[name])
                scales = smoothing_scales(channels, columns, activations.smoothquant)
                self.smooth(layer, i, product, scales)
                inputs[name] = inputs[name] / layer.expand(product, scales)
        result = self.unquantized(layer, products)
        for product in products:
            for part, weight in layer.parts(product, layer.weights[product]).items():
                result[part] = self._round(weight, inputs.get(f"model.layers.{i}.{product}"))
        return result

    def head(self) -> Rounded:
        """The output product."""
        return self._round(self.head_weight(), self._input_ranges(["lm_head"]).get("lm_head"))

    def products(self, i: int) -> list[str]:
        """Those of layer `i` that are quantized."""
        layer = f"model.layers.{i}."
        return [name for name, parts in PRODUCTS.items() if not self.quantization.keeps(layer + parts[0])]

    def smooth(self, layer: LayerWeights, i: int, product: str, scales: torch.Tensor) -> None:
        """`layer.smooth`, remembered."""
        layer.smooth(product, scales)
        self.smoothing[f"model.layers.{i}.{product}"] = scales.cpu()

    def unquantized(self, layer: LayerWeights, products: list[str]) -> Layer:
        """What stays in 16 bits: norms, biases, and the products that are kept; smoothing may have changed them."""
        result: Layer = {name: fitted(value, self.dtype, name).cpu() for name, value in layer.vectors.items()}
        for product in PRODUCTS.keys() - set(products):
            for part, weight in layer.parts(product, layer.weights[product]).items():
                result[f"{part}.weight"] = fitted(weight, self.dtype, part).cpu()
        return result

    def head_weight(self) -> torch.Tensor:
        name = f"{self.checkpoint.config.output_product}.weight"
        return finite(self.checkpoint.dequantized(name).load().to(self.device).float(), name, self.checkpoint)

    def stored(
        self,
        weight: torch.Tensor,
        values: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        input_scale: torch.Tensor | None = None,
    ) -> Rounded:
        """Numbers that stand for `weight` in the dtypes that they are kept in."""
        return Rounded(
            values.to(self.format.values).cpu(),
            fitted(scales, self.format.scale_dtype(self.dtype), "a scale").cpu(),
            None if zeros is None or self.options.symmetric else zeros.to(torch.int8).cpu(),
            input_scale,
            relative_error(weight, values, scales, zeros),
        )

    def _round(self, weight: torch.Tensor, input_range: torch.Tensor | None) -> Rounded:
        input_scale = None
        if self.format.activations == "static":
            if input_range is None:
                raise ValueError("a static scale is made from the range of a product's input")
            input_scale = scale_for(input_range.amax(), self.format.values).reshape(1).cpu()
        return self.stored(weight, *self.format.round(weight, self.dtype, self.options), input_scale)

    def _input_ranges(self, products: Iterable[str]) -> dict[str, torch.Tensor]:
        """By product, where they are known."""
        return {name: self.ranges[f"{name}.input"].to(self.device) for name in products} if self.ranges else {}


class _Sampled(Round):
    """A method that looks at samples of the activations themselves: its layers must be asked for in order."""

    @cached_property
    def traversal(self) -> Traversal:
        if self.samples is None:
            raise ValueError(f"{type(self).__name__} looks at samples")
        return Traversal(self.checkpoint, self.samples, self.device, self.map)

    def grid(self, width: int) -> Int4Grid:
        """Of a weight with `width` input channels."""
        if not isinstance(self.format, Int4Linear):
            raise ValueError(f"{type(self).__name__} makes int4 weights")
        return self.format.grid(width, self.dtype, self.options)

    def gram(self, stop: Stop, prepare: Callable[[torch.Tensor], torch.Tensor] = lambda x: x) -> torch.Tensor:
        """The sum of `x x^T` over all tokens that reach a product, after `prepare`, float32 `[in, in]`."""
        parts = iter(self.map(lambda x: _gram(prepare(x)), stop.inputs))
        total: torch.Tensor = next(parts)
        for part in parts:
            total.add_(part)
        if not total.isfinite().all():
            raise UserError(f"the inputs of {stop.name} hold NaN or infinite numbers; the checkpoint is damaged")
        return total

    def pieces(self, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows of a weight, to be worked on side by side."""
        return weight.split(ROWS if weight.device.type == "cpu" else len(weight))


def relative_error(
    weight: torch.Tensor, values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> float:
    """The norm of what rounding changed in a weight `[out, in]`, over the weight's own. The same on any threads."""
    numbers = (weight, values, scales, *(() if zeros is None else (zeros,)))
    lost = total = 0.0
    for rows, q, scale, *zero in zip(*(x.split(ROWS) for x in numbers), strict=True):
        groups = q.float().view(len(q), scale[0].numel(), -1)
        if zero:
            groups = groups - zero[0].view(len(q), -1, 1)
        difference = (groups * scale.view(len(q), -1, 1)).view_as(rows) - rows
        lost, total = (
            known + float(x.square().sum(1).double().cpu().numpy().sum())
            for known, x in ((lost, difference), (total, rows))
        )
    return (lost / total) ** 0.5 if total else 0.0


def _gram(x: torch.Tensor) -> torch.Tensor:
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x.T, x, out_dtype=torch.float32)
    return x.T @ x


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Tokens of norm 1; a token of zeros stays one."""
    norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
    return (x / norms.clamp_min(1e-6)).to(x.dtype)


class Gptq(_Sampled):
    """GPTQ: every product sees the inputs that the quantized ones before it compute.

    Each token counts alike, whatever its norm. As the paper has it, with squared norms as weights, the few tokens that
    gather attention (arXiv 2309.17453), a thousand times as large, decide alone what is kept (BENCHMARKS.md).
    """

    def layer(self, i: int) -> Layer:
        layer, products = LayerWeights(self.checkpoint, i, self.device), self.products(i)
        result = self.unquantized(layer, products)
        for stop in self.traversal.layer(i):
            product = stop.name.removeprefix(f"model.layers.{i}.")
            if product in products:
                weight = layer.weights.pop(product)
                parts = [layer.parts(product, x) for x in (weight, *self._gptq(stop, weight))]
                result |= {part: self.stored(*(numbers[part] for numbers in parts)) for part in parts[0]}
        return result

    def head(self) -> Rounded:
        weight = self.head_weight()
        (rounded,) = (self.stored(weight, *self._gptq(stop, weight)) for stop in self.traversal.head())
        return rounded

    def _gptq(self, stop: Stop, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inverse, grid = inverse_cholesky(self.gram(stop, _unit)), self.grid(weight.shape[1])
        pieces = self.map(lambda rows: gptq(rows, inverse, grid), self.pieces(weight))
        values, scales, zeros = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        stop.weight = grid.dequantize(values, scales, zeros).to(stop.weight.dtype)
        return values, scales, zeros


class Awq(_Sampled):
    """AWQ: scales, then clipping, from the inputs that the original weights compute."""

    def layer(self, i: int) -> Layer:
        layer, products = LayerWeights(self.checkpoint, i, self.device), self.products(i)
        grams, means = {}, {}
        for stop in self.traversal.layer(i):
            product = stop.name.removeprefix(f"model.layers.{i}.")
            grams[product], means[product] = self.gram(stop), self._mean(stop)
        for product in products:
            grid = self.grid(layer.weights[product].shape[1])
            scales = awq.search_scales(layer, product, grams[product], means[product], grid, self.map)
            self.smooth(layer, i, product, scales)
            wide = layer.expand(product, scales)
            grams[product] /= wide[:, None] * wide
        result = self.unquantized(layer, products)
        for product in products:
            for part, weight in layer.parts(product, layer.weights[product]).items():
                result[part] = self._clipped(weight, grams[product], clip=not part.endswith(("q_proj", "k_proj")))
        return result

    def head(self) -> Rounded:
        """Clipped alone: its input's norm is shared with nothing, but scaling it would change `model.norm`."""
        (rounded,) = (self._clipped(self.head_weight(), self.gram(stop), clip=True) for stop in self.traversal.head())
        return rounded

    def _clipped(self, weight: torch.Tensor, gram: torch.Tensor, clip: bool) -> Rounded:
        """Rounded after clipping; queries and keys are not clipped, as in the authors' code."""
        grid, clipped = self.grid(weight.shape[1]), weight
        if clip:
            clipped = torch.cat(list(self.map(lambda rows: awq.clip(rows, gram, grid), self.pieces(weight))))
        return self.stored(weight, *grid.round(clipped))

    def _mean(self, stop: Stop) -> torch.Tensor:
        """Mean magnitude of every input channel."""
        sums = self.map(lambda x: x.float().abs().sum(0), stop.inputs)
        return sum(sums) / sum(len(x) for x in stop.inputs)


METHODS: dict[str, type[Round]] = {"round": Round, "gptq": Gptq, "awq": Awq}
