"""Fusion: chains of operations become one operation with a kernel of its own, where a portable engine is loaded.

Nothing but that engine knows of it: what is stored, lowered, interpreted and calibrated are the operations. They define
what a fused one computes; its kernel, `trtbuild.kernels.NAME.NAME`, is only faster. To add one, add its file there,
with the chain that it equals on top, and a line to `RULES`.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib import import_module

import torch

from trtbuild.network import Network, Node, Op
from trtbuild.network.ops.add import Add
from trtbuild.network.ops.rms_norm import RmsNorm
from trtbuild.network.ops.swiglu import SwiGlu
from trtbuild.network.step import Step

# Of a step that is not a captured graph, the host is the limit below: to launch a Triton kernel takes it longer than to
# launch the kernels of torch that it replaces.
MIN_ROWS = 512


@dataclass(frozen=True)
class Rule:
    """A chain of operations, of which each reads what the one before it writes, and the kernel that replaces them.

    The kernel takes by name the inputs that come from outside the chain, and the operations' attributes. It returns
    what the last one writes; where `keeps`, after what the others write, which may then have more readers than the
    chain.
    """

    kernel: str
    chain: tuple[type[Op], ...]
    keeps: bool = False


RULES = (
    Rule("add_rms_norm", (Add, RmsNorm), keeps=True),  # the residual, which the next addition reads, and its norm
    Rule("swiglu", (SwiGlu,)),
)


@dataclass(frozen=True, eq=False)
class Fused(Op):
    """A chain of nodes as one operation with the tensors `outputs`; there is none outside a loaded engine."""

    kernel: Callable
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    @cached_property
    def inputs(self) -> dict[str, str]:
        """By parameter, the tensors that the chain reads and does not make; `ValueError` for two of one name."""
        made = {name for node in self.nodes for name in node.outputs}
        read = [(parameter, name) for node in self.nodes for parameter, name in node.inputs.items() if name not in made]
        if len(dict(read)) < len(read):
            raise ValueError(f"two inputs of {self.kernel} have one name: {read}")
        return dict(read)

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    @cached_property
    def attributes(self) -> dict:
        """Those of all operations."""
        return {name: value for node in self.nodes for name, value in asdict(node.op).items()}

    def reference(self, **inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        return self._chain(inputs, lambda op, given: op.reference(**given))

    def portable(self, step: Step, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        given = dict(zip(self.inputs, inputs, strict=True))
        if inputs[0].is_cuda and step.chunks is not None and len(inputs[0]) < MIN_ROWS:
            return self._chain(given, lambda op, given: op.portable(step, **given))
        results = self.kernel(**given, **self.attributes)[: len(self.outputs)]  # the last may be scales
        return results if len(results) > 1 else results[0]

    def _chain(
        self, inputs: dict[str, torch.Tensor], run: Callable[[Op, dict[str, torch.Tensor]], torch.Tensor | tuple]
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        values = {self.inputs[parameter]: x for parameter, x in inputs.items()}
        for node in self.nodes:
            result = run(node.op, {parameter: values[name] for parameter, name in node.inputs.items()})
            values |= zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=True)
        results = tuple(values[name] for name in self.outputs)
        return results if len(results) > 1 else results[0]


def fuse(network: Network, rules: Iterable[Rule] = RULES) -> Network:
    """The same network with one node for every chain that a rule describes and whose inner tensors allow it."""
    nodes = network.nodes
    for rule in rules:
        nodes = _applied(rule, nodes, {*network.outputs})
    return network.with_nodes(nodes)


def _applied(rule: Rule, nodes: list[Node], given: set[str]) -> list[Node]:
    """`nodes` with a rule's chains replaced, each where its last node was; `given` are the network's outputs."""
    kernel = getattr(import_module(f"trtbuild.kernels.{rule.kernel}"), rule.kernel)
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for name in node.inputs.values():
            readers.setdefault(name, []).append(i)

    def readers_of(names: Iterable[str]) -> list[int]:
        return [i for name in names for i in readers.get(name, [])]

    def chain_from(i: int) -> list[int]:
        """Indices of the nodes of a chain that may be replaced; empty if none starts here."""
        chain = [i]
        for kind in rule.chain[1:]:
            following = [j for j in readers_of(nodes[chain[-1]].outputs) if type(nodes[j].op) is kind]
            if not following:
                return []
            chain.append(following[0])
        inner = [name for j in chain[:-1] for name in nodes[j].outputs]
        others = {*readers_of(inner)} - {*chain}
        hidden = not others and given.isdisjoint(inner)
        return chain if hidden or (rule.keeps and all(j > chain[-1] for j in others)) else []

    replaced: dict[int, Node | None] = {}
    for i, node in enumerate(nodes):
        if type(node.op) is rule.chain[0] and replaced.keys().isdisjoint(chain := chain_from(i)) and chain:
            parts = tuple(nodes[j] for j in chain)
            outputs = tuple(name for part in (parts if rule.keeps else parts[-1:]) for name in part.outputs)
            fused = Fused(kernel, parts, outputs)
            replaced |= dict.fromkeys(chain) | {chain[-1]: Node(fused, fused.inputs, outputs)}
    now = (replaced.get(i, node) for i, node in enumerate(nodes))
    return [node for node in now if node]
