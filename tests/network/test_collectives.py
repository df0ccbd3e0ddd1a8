"""Operations between ranks: what they compute, in lock-step; who waits for whom; where they cannot run."""

from collections.abc import Callable

import pytest
import torch

from trtbuild.network import Network, Tensor, lockstep, ops
from trtbuild.network.ops.collectives import AllGather, AllReduce, Receive, Send
from trtbuild.network.ops.embedding import Embedding, EmbeddingPart

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def network(build: Callable[[Tensor, Tensor], Tensor | None], dtype: torch.dtype = torch.float32) -> Network:
    """One of `x` `[tokens, 3]` and `position_ids`; what `build` returns is its `result`."""
    network = Network()
    x = network.input("x", dtype, ("tokens", 3))
    result = build(x, network.input("position_ids", torch.int32, ("tokens",)))
    if result:
        network.mark_output(result, "result")
    return Network.from_json(network.to_json(), {})


def run(networks: list[Network], dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, list]:
    """What each rank had, `[ranks, tokens, 3]`, and what each got."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(len(networks), 5, 3, generator=draw).to(dtype)
    positions = torch.arange(5, dtype=torch.int32)
    outputs = lockstep.run(networks, [{"x": own, "position_ids": positions} for own in x])
    return x, [output.get("result") for output in outputs]


@dtypes
def test_all_reduce(dtype):
    """Two groups, whose sums are apart; of 16-bit numbers the exact sum is rounded, within a step."""
    groups = range(0, 2), range(2, 5)
    networks = [network(lambda x, _, g=g: ops.all_reduce(x, g), dtype) for g in groups for _ in g]
    x, results = run(networks, dtype)
    for group in groups:
        for rank in group:
            assert results[rank].dtype == dtype
            exact = x[group.start : group.stop].double().sum(0)
            assert ((results[rank].double() - exact).abs() <= torch.finfo(dtype).eps * x.abs().double().sum(0)).all()


@dtypes
def test_all_gather(dtype):
    groups = range(0, 3), range(3, 5)
    networks = [network(lambda x, _, g=g: ops.all_gather(x, g), dtype) for g in groups for _ in g]
    assert networks[0].tensors["result"].shape == ("tokens", 9)
    x, results = run(networks, dtype)
    for group in groups:
        expected = torch.stack([x[rank] for rank in group], 1).flatten(1)
        assert all(torch.equal(results[rank], expected) for rank in group)


@dtypes
def test_send_and_receive(dtype):
    """Rank 0 gives to 2 and 1 to 3; 2 and 3 pass the double on to 4, which adds what both have."""

    def between(source: int, target: int) -> Callable:
        def build(x, positions):
            received = ops.receive(positions, source, dtype, 3)
            ops.send(ops.add(received, received), target)
            return received

        return build

    def last(x, positions):
        return ops.add(*(ops.receive(positions, source, dtype, 3) for source in (2, 3)))

    networks = [
        *(network(lambda x, _, to=to: ops.send(x, to), dtype) for to in (2, 3)),
        network(between(0, 4), dtype),
        network(between(1, 4), dtype),
        network(last, dtype),
    ]
    assert (networks[2].tensors["result"].dtype, networks[2].tensors["result"].shape) == (dtype, ("tokens", 3))
    x, results = run(networks, dtype)
    assert results[:2] == [None, None]
    assert torch.equal(results[2], x[0])
    assert torch.equal(results[3], x[1])
    assert torch.equal(results[4], 2 * x[0] + 2 * x[1])


def test_one_rank_meets_nobody():
    alone = network(lambda x, _: ops.add(ops.all_gather(ops.all_reduce(x, range(1)), range(1)), x))
    assert [type(node.op).__name__ for node in alone.nodes] == ["Add"]


@dtypes
@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_parts_of_an_embedding(ranks, dtype):
    """They sum up to the whole one, exactly: a word is one rank's."""
    draw = torch.Generator().manual_seed(0)
    table, ids = torch.randn(20, 3, generator=draw).to(dtype), torch.randperm(20, generator=draw).int()
    parts = [EmbeddingPart(20 // ranks * i).reference(ids, part) for i, part in enumerate(table.chunk(ranks))]
    assert all(part.dtype == dtype for part in parts)
    assert torch.equal(sum(parts), Embedding().reference(ids, table))
    assert [(part != 0).any(1).sum() for part in parts] == [20 // ranks] * ranks


@pytest.mark.parametrize(
    "builds",
    [
        [lambda x, p: ops.receive(p, 1, torch.float32, 3), lambda x, p: ops.receive(p, 0, torch.float32, 3)],
        [lambda x, p: ops.all_reduce(x, range(2)), lambda x, p: ops.all_gather(x, range(2))],
        [lambda x, p: ops.all_reduce(x, range(2)), lambda x, p: ops.add(x, x)],
        [
            lambda x, p: ops.all_reduce(x, range(3)),
            lambda x, p: ops.all_reduce(x, range(2)),
            lambda x, p: ops.add(x, x),
        ],
        [lambda x, p: ops.send(x, 1), lambda x, p: ops.all_reduce(x, range(2))],
    ],
    ids=["both receive", "two kinds", "one is done", "other groups", "nobody receives"],
)
def test_ranks_that_wait_for_each_other(builds):
    with pytest.raises(RuntimeError, match=r"ranks wait for each other: \{0: "):
        run([network(build) for build in builds])


@pytest.mark.parametrize("op", [AllReduce(0, 2), AllGather(0, 2), Send(1), Receive(1, "float32", 3)], ids=str)
def test_one_rank_alone_cannot_run_them(op):
    with pytest.raises(NotImplementedError, match="run all ranks in lock-step"):
        op.reference(**dict.fromkeys(op.parameters, torch.ones(2, 3)))
