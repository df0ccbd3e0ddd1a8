"""Batched text generation over any session."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from trtbuild.errors import UserError
from trtbuild.runtime.beams import beam_search
from trtbuild.runtime.in_flight import InFlight, schedule
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.scheduler import Sequence
from trtbuild.runtime.session import PortableSession, Session

END = object()


@dataclass
class Output:
    """A continuation of a prompt. `finish_reason`: `eos`, `stop` (a stop word) or `length`. `score`: beam search's."""

    output_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    score: float | None = None


OnOutput = Callable[[int, Output], object]


@torch.inference_mode()
def generate(
    session: Session,
    prompts: list[list[int]],
    params: SamplingParams,
    decode: Callable[[list[int]], str] | None = None,
    on_token: Callable[[int, int], object] = lambda prompt, token: None,
    say: Callable[[str], object] = lambda line: None,
    on_output: OnOutput = lambda index, output: None,
) -> list[Output]:
    """Continues every prompt (token ids).

    As many as `max_batch_size` are a batch. More are several, or where sequences may be in pages (`session.pages`) they
    run in flight, as many at a time as there is room for, of which `say` is told. The order does not matter to any.
    Each has `num_return_sequences` outputs, one after the other. `decode` turns ids into text and is needed for stop
    words. `on_token(output's index, token)` is called as tokens come, which beams do not, and `on_output(its index,
    output)` where one has ended. `output_ids` ends with the end-of-sequence token if there was one. Raises `UserError`
    for a prompt, an output length or a bad word that is not the engine's, before anything runs, and where numbers are
    not finite.
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
        session.check_prompt(prompt, f"prompt {i}")
    for word in params.bad_words:
        if not 0 <= min(word) <= max(word) < session.vocab_size:
            raise UserError(f"the bad word {list(word)} is outside the engine's vocabulary of {session.vocab_size}")
    if params.num_beams > 1:
        return _search(session, prompts, params, on_output)
    prompts = [prompt for prompt in prompts for _ in range(params.num_return_sequences)]
    outputs = [Output() for _ in prompts]
    if isinstance(session, PortableSession) and session.pages and len(prompts) > limits.max_batch_size:
        _generate_in_flight(session, prompts, outputs, params, decode, on_token, say, on_output)
        return outputs
    for first in range(0, len(prompts), limits.max_batch_size):
        end = min(first + limits.max_batch_size, len(prompts))
        going = []
        for part in session.parts(end - first):
            batch = slice(first, min(first + part.limits.max_batch_size, end))
            given = params, decode, on_token, on_output
            going.append(_generate_batch(part, prompts[batch], outputs[batch], first, *given))
            first = batch.stop
        while going:
            going = [one for one in going if next(one, END) is not END]
    return outputs


def _search(session: Session, prompts: list[list[int]], params: SamplingParams, on_output: OnOutput) -> list[Output]:
    size, outputs = max(1, session.limits.max_batch_size // params.num_beams), []
    for first in range(0, len(prompts), size):
        for found in beam_search(session, prompts[first : first + size], params):
            for ids, score in found:
                outputs.append(Output(ids, _finish_reason(ids, params, None), score))
                on_output(len(outputs) - 1, outputs[-1])
    return outputs


def _generate_in_flight(
    session: PortableSession,
    prompts: list[list[int]],
    outputs: list[Output],
    params: SamplingParams,
    decode: Callable[[list[int]], str] | None,
    on_token: Callable[[int, int], object],
    say: Callable[[str], object],
    on_output: OnOutput,
) -> None:
    def take(sequence: Sequence, token: int) -> bool:
        output = outputs[sequence.index]
        output.output_ids.append(token)
        output.finish_reason = _finish_reason(output.output_ids, params, decode)
        on_token(sequence.index, token)
        if output.finish_reason:
            on_output(sequence.index, output)
        return bool(output.finish_reason)

    sequences = [Sequence(i, prompt, params.max_output_len) for i, prompt in enumerate(prompts)]
    InFlight(session, schedule(session, sequences, params), params, take, say).run()


def _generate_batch(
    session: Session,
    prompts: list[list[int]],
    outputs: list[Output],
    first: int,
    params: SamplingParams,
    decode: Callable[[list[int]], str] | None,
    on_token: Callable[[int, int], object],
    on_output: OnOutput,
) -> Iterator[None]:
    """Comes back wherever it has started a step, so that others can be started before its logits are asked for."""
    logits_of = session.start_prefill(prompts)
    sampler = session.sampler(params, prompts, first)  # while the device is at work
    ring = sampler.ring
    yield
    logits = logits_of()
    finite = torch.ones(1, dtype=torch.bool, pin_memory=logits.is_cuda)
    finite.copy_(logits.sum().isfinite(), non_blocking=True)  # there before the first tokens are
    sampler(logits)
    ring.send()
    while ring.received < params.max_output_len and not all(output.finish_reason for output in outputs):
        while ring.sent < params.max_output_len and not ring.full:
            logits_of = session.start_generate(sampler)
            yield
            logits = logits_of()
            ring.send()
        for tokens in ring.receive():
            if not finite:
                raise session.not_finite(prompts)
            for index, (output, token) in enumerate(zip(outputs, tokens, strict=True)):
                if not output.finish_reason:
                    output.output_ids.append(token)
                    output.finish_reason = _finish_reason(output.output_ids, params, decode)
                    on_token(first + index, token)
                    if output.finish_reason:
                        on_output(first + index, output)
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
