"""What many tests compute: a relative error, and a network by its operations' definitions."""

from collections.abc import Callable

import numpy as np
import torch

from trtbuild.engine.portable import PortableEngine
from trtbuild.network import Network, lockstep
from trtbuild.tensors.lazy import from_tensor


def error(actual: torch.Tensor, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of what is expected."""
    return np.linalg.norm(actual.double().numpy() - expected) / np.linalg.norm(expected)


def check_linear(op, inputs: list[torch.Tensor | None], expected: np.ndarray, tolerance: float) -> None:
    """An operation's two ways to compute, in the dtype of its input, against float64; its inputs stay as they are."""
    given = [t for t in inputs if t is not None]
    before = [t.clone() for t in given]
    reference, portable = op.reference(*inputs), op.portable(None, *inputs)
    assert reference.dtype == portable.dtype == inputs[0].dtype
    assert error(reference, expected) < tolerance
    assert error(portable, expected) < tolerance
    assert error(portable, reference.double().numpy()) < tolerance
    assert all(t.float().equal(b.float()) for t, b in zip(given, before, strict=True))


def run_reference(network: Network, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A network's outputs by its operations' `reference`."""
    (outputs,) = lockstep.run([network], [inputs])
    return outputs


def change_constant(session, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Gives a portable session's engine another value of a constant."""
    network = session.engine.network
    network.constants[name] = from_tensor(change(network.constants[name].load().clone()))
    session.engine = PortableEngine(network, session.limits, session.device)


def step_logits(session, prompts, new_tokens, all_logits: bool = True) -> torch.Tensor:
    """Logits of the prompts, then of every decode step, in rows."""
    logits = [session.prefill(prompts, all_logits)]
    return torch.cat(logits + [session.decode(tokens).clone() for tokens in new_tokens])


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`error` of two tensors."""
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def among_nan(x: torch.Tensor) -> torch.Tensor:
    """The same numbers where memory before and behind them is NaN: who reads beyond them shows it."""
    memory = torch.full((3, *x.shape), float("nan"), dtype=x.dtype)
    memory[1] = x
    return memory[1]
