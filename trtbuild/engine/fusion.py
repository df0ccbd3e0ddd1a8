"""Fusion: chains of operations become one operation with kernels of its own, where a portable engine is loaded.

Nothing but that engine knows of it: what is stored, lowered, interpreted and calibrated are the operations. They define
what a fused one computes; its kernels (`engine/fused.py`) are only faster, and what these do not take, the chain does.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from trtbuild import kernels
from trtbuild.network import Network, Node, Op
from trtbuild.network.step import Step

Result = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Member:
    """A place in a chain, for an operation of one of these classes."""

    kinds: tuple[type[Op], ...]
    optional: bool = False


def one(*kinds: type[Op]) -> Member:
    """A member that must be there."""
    return Member(kinds)


def maybe(*kinds: type[Op]) -> Member:
    """A member that may be there."""
    return Member(kinds, optional=True)


@dataclass(frozen=True, eq=False)
class Fused(Op):
    """A chain of nodes as one operation with the tensors `outputs`; there is none outside a loaded engine.

    A subclass has `kernel`, which gets by name what the chain reads and does not make: the operations' parameters, in
    other words where `names` has them. What operations of a kind in `keeps` make may be read outside, too.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]

    names: ClassVar[dict[tuple[type[Op], str], str]] = {}
    keeps: ClassVar[tuple[type[Op], ...]] = ()

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Tensors by parameter; `ValueError` for two of one name."""
        made = {name for node in self.nodes for name in node.outputs}
        read = [
            (self.name_of(node, parameter), name)
            for node in self.nodes
            for parameter, name in node.inputs.items()
            if name not in made
        ]
        if len(dict(read)) < len(read):
            raise ValueError(f"two inputs of {type(self).__name__} have one name: {read}")
        return dict(read)

    def name_of(self, node: Node, parameter: str) -> str:
        """The name here of what one of the chain's nodes calls `parameter`."""
        return self.names.get((type(node.op), parameter), parameter)

    @classmethod
    def kept(cls, node: Node) -> Sequence[str]:
        """What a node, not the last of its chain, makes that may be read outside, too."""
        return node.outputs if type(node.op) in cls.keeps else ()

    @property
    def parameters(self) -> tuple[str, ...]:
        return tuple(self.inputs)

    def kernel(self, step: Step, *args: Any, **inputs: Any) -> Result | None:
        """What `reference` gives; None where kernels do not take these inputs."""
        raise NotImplementedError

    def reference(self, *args: Any, **inputs: torch.Tensor) -> Result:
        return self.chain(inputs, lambda op, given: op.reference(**given))

    def portable(self, step: Step, *inputs: torch.Tensor) -> Result:
        given = dict(zip(self.inputs, inputs, strict=True))
        result = self.kernel(step, **given) if kernels.run_on(inputs[0].device) else None
        return self.chain(given, lambda op, given: op.portable(step, **given)) if result is None else result

    def chain(
        self, inputs: dict[str, torch.Tensor], run: Callable[[Op, dict[str, torch.Tensor]], torch.Tensor | tuple]
    ) -> Result:
        """The operations one after the other, each as `run` does it."""
        values = {self.inputs[parameter]: x for parameter, x in inputs.items()}
        for node in self.nodes:
            result = run(node.op, {parameter: values[name] for parameter, name in node.inputs.items()})
            values |= zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=True)
        results = tuple(values[name] for name in self.outputs)
        return results if len(results) > 1 else results[0]


@dataclass(frozen=True)
class Rule:
    """A chain, of which each member reads what one before it writes, and the operation that takes its place.

    `rows`: the first dimension of all that the chain makes, if that matters. `before`: the only kind of
    operation that reads the first output of its last, likewise.
    """

    fused: type[Fused]
    chain: tuple[Member, ...]
    rows: str | None = None
    before: type[Op] | None = None


def fuse(network: Network, rules: Iterable[Rule]) -> Network:
    """The same network with one node for every chain that a rule describes and whose inner tensors allow it.

    Earlier rules go first, and of a rule longer chains.
    """
    nodes = network.nodes
    for rule in rules:
        nodes = _applied(rule, nodes, network)
    return network.with_nodes(nodes)


def _applied(rule: Rule, nodes: list[Node], network: Network) -> list[Node]:
    """`nodes`, all of the network's, with a rule's chains replaced, each where its last node was."""
    given = {*network.outputs}
    readers: dict[str, list[int]] = {}
    for i, node in enumerate(nodes):
        for name in node.inputs.values():
            readers.setdefault(name, []).append(i)

    def chains_from(i: int, members: Sequence[Member]) -> Iterator[list[int]]:
        """Indices of nodes, from `i` on, that these members describe; longer ones first."""
        for place, member in enumerate(members):
            rest = members[place + 1 :]
            if type(nodes[i].op) in member.kinds:
                for j in sorted({j for name in nodes[i].outputs for j in readers.get(name, ())}):
                    yield from ([i, *following] for following in chains_from(j, rest))
                if all(other.optional for other in rest):
                    yield [i]
            if not member.optional:
                return

    def kept(chain: list[int]) -> list[str]:
        """What is read outside a chain, too."""
        return [name for j in chain[:-1] for name in rule.fused.kept(nodes[j])]

    def may_be_replaced(chain: list[int]) -> bool:
        inner = {name for j in chain[:-1] for name in nodes[j].outputs} - {*kept(chain)}
        hidden = given.isdisjoint(inner) and all(len(readers[x]) == 1 and readers[x][0] in chain for x in inner)
        later = all(j in chain or j > chain[-1] for name in kept(chain) for j in readers.get(name, ()))
        made = [network.tensors[name].shape[0] for j in chain for name in nodes[j].outputs]
        fits = rule.rows is None or {*made} == {rule.rows}
        if rule.before:
            fits &= {type(nodes[j].op) for j in readers.get(nodes[chain[-1]].outputs[0], ())} == {rule.before}
        return hidden and later and fits and replaced.keys().isdisjoint(chain)

    replaced: dict[int, Node | None] = {}
    for i in range(len(nodes)):
        chain = next(filter(may_be_replaced, chains_from(i, rule.chain)), None)
        if chain:
            outputs = (*kept(chain), *nodes[chain[-1]].outputs)
            fused = rule.fused(tuple(nodes[j] for j in chain), outputs)
            replaced |= dict.fromkeys(chain) | {chain[-1]: Node(fused, fused.inputs, outputs)}
    now = (replaced.get(i, node) for i, node in enumerate(nodes))
    return [node for node in now if node]
