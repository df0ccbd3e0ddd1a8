"""All ranks of a network in one process, by their operations' definitions: what collective operations compute."""

from collections.abc import Generator, Sequence

import torch

from trtbuild.network.network import Network
from trtbuild.network.ops.collectives import Collective

Values = dict[str, torch.Tensor]
Run = Generator[tuple[Collective, Values], torch.Tensor | tuple | None, Values]


def run(networks: Sequence[Network], inputs: Sequence[Values]) -> list[Values]:
    """Every rank's outputs by name, from every rank's network and inputs by name.

    A rank goes on until it meets others, and again when they are all there. Raises `RuntimeError` where they wait for
    each other for ever.
    """
    runs = [_run(network, values) for network, values in zip(networks, inputs, strict=True)]
    results: list[Values] = [{} for _ in runs]
    waiting: dict[int, tuple[Collective, Values]] = {}

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
    """Yields at every collective operation, with its inputs by name; is sent its result. Returns the outputs."""
    values = inputs | {name: constant.load() for name, constant in network.constants.items()}
    for node in network.nodes:
        given = {parameter: values[name] for parameter, name in node.inputs.items()}
        result = (yield node.op, given) if isinstance(node.op, Collective) else node.op.reference(**given)
        values |= zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=True)
    return {name: values[name] for name in network.outputs}
