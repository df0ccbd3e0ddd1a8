"""Tensors, operations and the network that lists them; everything but the weights' values serializes to JSON."""

import dataclasses
import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.tensors.lazy import LazyTensor

if TYPE_CHECKING:
    from trtbuild.network.step import Step

Shape = tuple[int | str, ...]
Spec = tuple[torch.dtype, Shape]


@dataclass(frozen=True)
class Tensor:
    """A named value of a network. A dimension is a number, or the name of a dynamic dimension (`tokens`, `batch`)."""

    name: str
    dtype: torch.dtype
    shape: Shape
    network: "Network" = field(repr=False, compare=False)

    def size(self, dim: int) -> int:
        """A dimension that is a number. Raises `ValueError` for a dynamic one."""
        if isinstance(size := self.shape[dim], str):
            raise ValueError(f"dimension {dim} of {self} is dynamic")
        return size


@dataclass(frozen=True)
class Op:
    """An operation: its attributes (the fields of a frozen dataclass) and all that is known of it.

    A subclass defines `infer`, `reference` and `to_tensorrt`, and `portable` where a faster equal of `reference`
    is worth having. Its inputs are the parameters of these methods, with the same names and in the same order; one that
    may be absent has the default None. Defining the class makes its name known to `Network.from_json`.
    """

    # Every operation has parameters of its own, so here they are `*args: Any, **inputs: Any`.

    kinds: ClassVar[dict[str, type["Op"]]] = {}
    selects: ClassVar[bool] = False  # whether it reads only some rows of its constant

    def __init_subclass__(cls) -> None:
        Op.kinds[cls.__name__] = cls

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of all inputs, in order."""
        return tuple(inspect.signature(self.infer).parameters)

    def infer(self, *args: Any, **inputs: Any) -> list[Spec]:
        """Dtype and shape of every output. Raises `ValueError` where the inputs do not fit together."""
        raise NotImplementedError

    def reference(self, *args: Any, **inputs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """The definition of right, in plain torch on any device, in whatever dtype the inputs have."""
        raise NotImplementedError

    def portable(self, step: "Step", *args: Any, **inputs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What the portable engine runs; `step` is its `Step` (`network/step.py`)."""
        return self.reference(*args, **inputs)

    def prepare(self, device: torch.device, *args: Any, **constants: Any) -> dict[str, torch.Tensor]:
        """The inputs that are constants, as `portable` wants them on a device; called when an engine is loaded.

        What needs no change must be returned as it came, so that its readers share it.
        """
        return constants

    def to_tensorrt(self, lowering: Lowering, *args: Any, **inputs: Any) -> Lowered | tuple[Lowered, ...]:
        """Adds TensorRT layers through `lowering`; returns the output tensor, or a tuple."""
        raise NotImplementedError


@dataclass(frozen=True)
class Node:
    """One application of an operation: its inputs' tensors by parameter, those that are there; its outputs' names."""

    op: Op
    inputs: dict[str, str]
    outputs: tuple[str, ...]


class Network:
    """Inputs, constants, nodes in execution order, outputs."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.constants: dict[str, LazyTensor] = {}
        self.inputs: list[str] = []
        self.outputs: list[str] = []
        self.states: dict[str, str] = {}  # inputs that a step updates, KV caches: the outputs that take their place
        self.nodes: list[Node] = []
        self._nodes_of: dict[str, list[int]] = {}  # by tensor: the nodes that make or read it

    def input(self, name: str, dtype: torch.dtype, shape: Iterable[int | str]) -> Tensor:
        """Declares an input."""
        self.inputs.append(name)
        return self._tensor(name, dtype, shape)

    def constant(self, name: str, value: LazyTensor) -> Tensor:
        """Declares a constant; a name declared before gives that same constant (tied weights are stored once).

        Raises `ValueError` for a name declared before with another value.
        """
        if name not in self.constants:
            self.constants[name] = value
            return self._tensor(name, value.dtype, value.shape)
        if not _same(self.constants[name], value):
            raise ValueError(f"two values of the constant {name}")
        return self.tensors[name]

    def add(self, op: Op, /, **inputs: Tensor | None) -> Any:
        """Appends a node; returns its output tensor, or the tuple of them. An input that is None is absent."""
        given = {parameter: x for parameter, x in inputs.items() if x is not None}
        specs = op.infer(**given)
        name = f"{type(op).__name__}.{len(self.nodes)}"
        names = [name if i == 0 else f"{name}.{i}" for i in range(len(specs))]
        outputs = tuple(self._tensor(name, *spec) for name, spec in zip(names, specs, strict=True))
        self._append(Node(op, {parameter: x.name for parameter, x in given.items()}, tuple(names)))
        return outputs[0] if len(outputs) == 1 else outputs

    def mark_output(self, tensor: Tensor, name: str) -> None:
        """Makes a tensor a network output called `name`, which no other tensor may have."""
        old = tensor.name
        if name in self.tensors and name != old:
            raise ValueError(f"two tensors are called {name}")
        self.tensors[name] = dataclasses.replace(self.tensors.pop(old), name=name)
        self._nodes_of[name] = self._nodes_of.pop(old, [])
        for i in self._nodes_of[name]:
            node = self.nodes[i]
            inputs = {parameter: name if x == old else x for parameter, x in node.inputs.items()}
            self.nodes[i] = Node(node.op, inputs, tuple(name if x == old else x for x in node.outputs))
        self.outputs.append(name)

    def with_nodes(self, nodes: Iterable[Node]) -> "Network":
        """Other nodes between the same inputs, constants and outputs; they make tensors that this network has."""
        network = Network()
        network.inputs, network.outputs = list(self.inputs), list(self.outputs)
        network.constants, network.states = dict(self.constants), dict(self.states)
        for node in nodes:
            network._append(node)
        made = (name for node in network.nodes for name in node.outputs)
        for name in (*network.constants, *network.inputs, *made):
            network._tensor(name, self.tensors[name].dtype, self.tensors[name].shape)
        return network

    def last_uses(self) -> dict[str, int]:
        """By tensor that is read, the index of the last node that reads it; of an output, the number of nodes."""
        uses = {name: i for i, node in enumerate(self.nodes) for name in node.inputs.values()}
        return uses | dict.fromkeys(self.outputs, len(self.nodes))

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that one generation step reads: everything but an embedding table that is only indexed."""
        read = {name for node in self.nodes if not node.op.selects for name in node.inputs.values()}
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
                    "inputs": node.inputs,
                    "outputs": list(node.outputs),
                }
                for node in self.nodes
            ],
            "outputs": self.outputs,
            "states": self.states,
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
            node = Node(op, dict(entry["inputs"]), tuple(entry["outputs"]))
            specs = op.infer(**{parameter: network.tensors[name] for parameter, name in node.inputs.items()})
            for name, spec in zip(node.outputs, specs, strict=True):
                network._tensor(name, *spec)
            network._append(node)
        network.outputs, network.states = value["outputs"], value["states"]
        return network

    def _tensor(self, name: str, dtype: torch.dtype, shape: Iterable[int | str]) -> Tensor:
        if name in self.tensors:
            raise ValueError(f"two tensors are called {name}")
        tensor = self.tensors[name] = Tensor(name, dtype, tuple(shape), self)
        return tensor

    def _append(self, node: Node) -> None:
        for name in {*node.inputs.values(), *node.outputs}:
            self._nodes_of.setdefault(name, []).append(len(self.nodes))
        self.nodes.append(node)


def _same(a: LazyTensor, b: LazyTensor) -> bool:
    """Whether two tensors hold the same bits; only those that do not come from one source are loaded to see."""
    if a == b or (a.dtype, tuple(a.shape)) != (b.dtype, tuple(b.shape)):
        return a == b
    return torch.equal(*(x.load().flatten().view(torch.uint8) for x in (a, b)))
