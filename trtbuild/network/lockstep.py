"""All ranks of a network in one process, by their operations' definitions: what collective operations compute."""

from collections.abc import Generator, Sequence
from typing import Protocol

import torch

from trtbuild.network.network import Network
from trtbuild.network.ops.collectives import Collective, Meeting

Values = dict[str, torch.Tensor]


class Meets(Protocol):
    """What ranks do together: a `Collective`, or what one is lowered to."""

    def meeting(self, rank: int) -> Meeting: ...

    def together(self, *brought: Values) -> Sequence[torch.Tensor | tuple]: ...


Run = Generator[tuple[Meets, Values], torch.Tensor | tuple | None, Values]


def run(networks: Sequence[Network], inputs: Sequence[Values]) -> list[Values]:
    """Every rank's outputs by name, from every rank's network and inputs by name (`meet`)."""
    return meet([_run(network, values) for network, values in zip(networks, inputs, strict=True)])


def meet(runs: Sequence[Run]) -> list[Values]:
    """What each rank's run returns; it yields what it meets others for, with what it brings, and is sent its result.

    A rank goes on until it meets others, and again when they are all there. Raises `RuntimeError` where they wait for
    each other for ever.
    """
    results: list[Values] = [{} for _ in runs]
    waiting: dict[int, tuple[Meets, Values]] = {}

    def go_on(rank: int, result: torch.Tensor | tuple | None) -> None:
        try:
            waiting[rank] = runs[rank].send(result)
        except StopIteration as end:
            waiting.pop(rank, None)
            results[rank] = end.value

    for rank in range(len(runs)):
        go_on(rank, None)
    while waiting:
        meetings = {op.meeting(rank) for rank, (op, _) in waiting.items()}
        complete = [
            (kind, ranks)
            for kind, ranks in meetings
            if all(rank in waiting and waiting[rank][0].meeting(rank) == (kind, ranks) for rank in ranks)
        ]
        if not complete:
            raise RuntimeError(f"ranks wait for each other: { ({rank: op for rank, (op, _) in waiting.items()}) }")
        for _, ranks in complete:
            outputs = waiting[ranks[0]][0].together(*(waiting[rank][1] for rank in ranks))
            for rank, result in zip(ranks, outputs, strict=True):
                go_on(rank, result)
    return results


def _run(network: Network, inputs: Values) -> Run:
    """A network's; it returns the outputs."""
    values = inputs | {name: constant.load() for name, constant in network.constants.items()}
    for node in network.nodes:
        given = {parameter: values[name] for parameter, name in node.inputs.items()}
        result = (yield node.op, given) if isinstance(node.op, Collective) else node.op.reference(**given)
        values |= zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=True)
    return {name: values[name] for name in network.outputs}
