"""Batched text generation over any session."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from trtbuild.errors import UserError
from trtbuild.runtime.sampling import Sampler, SamplingParams
from trtbuild.runtime.session import Session


@dataclass
class Output:
    """What one prompt led to. `finish_reason`: `eos`, `stop` (a stop word) or `length`."""

    output_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""


@torch.inference_mode()
def generate(
    session: Session,
    prompts: list[list[int]],
    params: SamplingParams,
    decode: Callable[[list[int]], str] | None = None,
    on_token: Callable[[int, int], object] = lambda prompt, token: None,
) -> list[Output]:
    """Continues every prompt (token ids); more than `max_batch_size` are run in several batches.

    `decode` turns ids into text and is needed for stop words. `on_token(prompt index, token)` is called as tokens
    come. `output_ids` ends with the end-of-sequence token if there was one. Raises `UserError` for a prompt or an
    output length that the engine cannot hold, before anything runs, and where numbers are not finite.
    """
    limits = session.limits
    if params.max_output_len > limits.max_output_len:
        raise UserError(
            f"max_output_len {params.max_output_len} is more than the engine's {limits.max_output_len}; "
            "ask for less or build with a larger --max-output-len"
        )
    if params.stop_words and decode is None:
        raise ValueError("stop words need a tokenizer's decode")
    for i, prompt in enumerate(prompts):
        session.check_prompt(prompt, i)
    outputs = [Output() for _ in prompts]
    for first in range(0, len(prompts), limits.max_batch_size):
        batch = slice(first, first + limits.max_batch_size)
        _generate_batch(session, prompts[batch], outputs[batch], first, params, decode, on_token)
    return outputs


def _generate_batch(
    session: Session,
    prompts: list[list[int]],
    outputs: list[Output],
    first: int,
    params: SamplingParams,
    decode: Callable[[list[int]], str] | None,
    on_token: Callable[[int, int], object],
) -> None:
    sampler = Sampler(params, prompts, first, session.device)
    # On a GPU the next step is launched before the last one's tokens are looked at, so the device never waits for the
    # host; the price is one step too many at the end. On a CPU that step would cost its full time.
    ahead = session.device.type == "cuda"
    logits = session.prefill(prompts)
    finite = _to_host(logits.sum().isfinite().view(1))
    tokens = sampler(logits)
    for i in range(params.max_output_len):
        fetch = _to_host(tokens)
        last = i + 1 == params.max_output_len
        if ahead and not last:
            logits = session.decode(tokens)
            tokens = sampler(logits)
        fetched = fetch()
        if i == 0 and not finite()[0]:
            raise session.not_finite(prompts)
        for index, (output, token) in enumerate(zip(outputs, fetched, strict=True)):
            if not output.finish_reason:
                output.output_ids.append(token)
                output.finish_reason = _finish_reason(output.output_ids, params, decode)
                on_token(first + index, token)
        if last or all(output.finish_reason for output in outputs):
            break
        if not ahead:
            logits = session.decode(tokens)
            tokens = sampler(logits)
    # What is not finite stays in the cache, so the last step tells of those before; what follows an end does not count.
    going = [len(output.output_ids) == params.max_output_len for output in outputs]
    session.check_finite(prompts, logits[torch.tensor(going, device=logits.device)])


def _finish_reason(output_ids: list[int], params: SamplingParams, decode: Callable[[list[int]], str] | None) -> str:
    if output_ids[-1] in params.eos_token_ids:
        return "eos"
    if params.stop_words and decode:
        # A token is at least a byte, so a word that ends now lies within as many tokens as the longest has bytes.
        tail = decode(output_ids[-max(len(word.encode()) for word in params.stop_words) - 1 :])
        if any(word in tail for word in params.stop_words):
            return "stop"
    return "length" if len(output_ids) == params.max_output_len else ""


def _to_host(tokens: torch.Tensor) -> Callable[[], list[int]]:
    """Starts a copy to the host; the returned call waits for it alone, not for later work."""
    if tokens.device.type != "cuda":
        return tokens.tolist
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    done = torch.cuda.Event()
    done.record()

    def wait() -> list[int]:
        done.synchronize()
        return host.tolist()

    return wait
