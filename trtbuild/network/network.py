"""Tensors, operations and the network that lists them; everything but the weights' values serializes to JSON."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from trtbuild.tensors.lazy import LazyTensor


@dataclass(frozen=True)
class Tensor:
    """A named value of a network. A dimension is a number, or the name of a dynamic dimension (`tokens`, `batch`)."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str, ...]
    network: "Network" = field(repr=False, compare=False)


class Op:
    """An operation: its attributes (the fields of a frozen dataclass) and all that is known of it.

    A subclass defines `infer`, `reference` and `to_tensorrt`, and `portable` where a faster equal of `reference`
    is worth having. Defining the class makes its name known to `Network.from_json`.
    """

    kinds: ClassVar[dict[str, type["Op"]]] = {}

    def __init_subclass__(cls) -> None:
        Op.kinds[cls.__name__] = cls

    def infer(self, *inputs: Tensor) -> list[tuple[torch.dtype, tuple[int | str, ...]]]:
        """Dtype and shape of every output. Raises `ValueError` where the inputs do not fit together."""
        raise NotImplementedError

    def reference(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The definition of right, in plain torch on any device, in whatever dtype the inputs have."""
        raise NotImplementedError

    def portable(self, step: Any, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What the portable engine runs; `step` is its `StepContext`."""
        return self.reference(*inputs)

    def prepare(self, device: torch.device, *constants: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The inputs that are constants, as `portable` wants them on a device; called when an engine is loaded."""
        return constants

    def to_tensorrt(self, lowering: Any, *inputs: Any) -> Any:
        """Adds TensorRT layers through `lowering` (see `engine/lowering.py`); returns the output tensor, or a tuple."""
        raise NotImplementedError


@dataclass(frozen=True)
class Node:
    """One application of an operation; inputs and outputs are names of tensors."""

    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class Network:
    """Inputs, constants, nodes in execution order, outputs."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.constants: dict[str, LazyTensor] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.nodes: list[Node] = []

    def input(self, name: str, dtype: torch.dtype, shape: Iterable[int | str]) -> Tensor:
        """Declares an input."""
        self.inputs.append(name)
        return self._tensor(name, dtype, shape)

    def constant(self, name: str, value: LazyTensor) -> Tensor:
        """Declares a constant; a name declared before gives that same constant (tied weights are stored once)."""
        if name in self.constants:
            return self.tensors[name]
        self.constants[name] = value
        return self._tensor(name, value.dtype, value.shape)

    def add(self, op: Op, *inputs: Tensor) -> Any:
        """Appends a node; returns its output tensor, or the tuple of them."""
        names = [f"{type(op).__name__}.{len(self.nodes)}"]
        specs = op.infer(*inputs)
        names += [f"{names[0]}.{i}" for i in range(1, len(specs))]
        outputs = tuple(self._tensor(name, *spec) for name, spec in zip(names, specs, strict=True))
        self.nodes.append(Node(op, tuple(t.name for t in inputs), tuple(names)))
        return outputs[0] if len(outputs) == 1 else outputs

    def mark_output(self, tensor: Tensor, name: str) -> None:
        """Makes the last-added producer's output a network output called `name`, which no other tensor may have."""
        if name in self.tensors and name != tensor.name:
            raise ValueError(f"two tensors are called {name}")
        self.tensors[name] = dataclasses.replace(self.tensors.pop(tensor.name), name=name)
        self.nodes = [
            dataclasses.replace(
                node,
                inputs=tuple(name if n == tensor.name else n for n in node.inputs),
                outputs=tuple(name if n == tensor.name else n for n in node.outputs),
            )
            for node in self.nodes
        ]
        self.outputs.append(name)

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one generation step reads: everything but an embedding table that is only indexed."""
        read = {name for node in self.nodes for name in node.inputs if type(node.op).__name__ != "Embedding"}
        return sum(constant.nbytes for name, constant in self.constants.items() if name in read)

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether any of its tensors is of a dtype."""
        return any(tensor.dtype == dtype for tensor in self.tensors.values())

    def to_json(self) -> dict:
        """All but the constants' values."""

        def spec(name: str) -> dict:
            tensor = self.tensors[name]
            return {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}

        return {
            "inputs": [spec(name) for name in self.inputs],
            "nodes": [
                {
                    "op": type(node.op).__name__,
                    **({"attributes": attributes} if (attributes := dataclasses.asdict(node.op)) else {}),
                    "inputs": list(node.inputs),
                    "outputs": list(node.outputs),
                }
                for node in self.nodes
            ],
            "outputs": self.outputs,
        }

    @classmethod
    def from_json(cls, value: dict, constants: dict[str, LazyTensor]) -> "Network":
        """The inverse of `to_json`; shapes are inferred anew, so they are checked against the constants."""
        network = cls()
        for spec in value["inputs"]:
            network.input(spec["name"], getattr(torch, spec["dtype"]), spec["shape"])
        for name, constant in constants.items():
            network.constant(name, constant)
        for entry in value["nodes"]:
            op = Op.kinds[entry["op"]](**entry.get("attributes", {}))
            node = Node(op, tuple(entry["inputs"]), tuple(entry["outputs"]))
            for name, output in zip(node.outputs, op.infer(*(network.tensors[n] for n in node.inputs)), strict=True):
                network._tensor(name, *output)
            network.nodes.append(node)
        network.outputs = value["outputs"]
        return network

    def _tensor(self, name: str, dtype: torch.dtype, shape: Iterable[int | str]) -> Tensor:
        if name in self.tensors:
            raise ValueError(f"two tensors are called {name}")
        tensor = self.tensors[name] = Tensor(name, dtype, tuple(shape), self)
        return tensor
