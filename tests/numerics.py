"""What many tests compute: a relative error, and a network by its operations' definitions."""

import numpy as np
import torch

from trtbuild.network import Network, lockstep


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


def step_logits(session, prompts, new_tokens, all_logits: bool = True) -> torch.Tensor:
    """Logits of the prompts, then of every decode step, in rows."""
    logits = [session.prefill(prompts, all_logits)]
    return torch.cat(logits + [session.decode(tokens).clone() for tokens in new_tokens])
