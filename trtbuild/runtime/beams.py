"""Beam search: the likeliest continuations of a prompt, those that `transformers`' `generate(num_beams=...)` finds."""

from typing import NamedTuple

import torch

from trtbuild.errors import UserError
from trtbuild.runtime.sampling import Sampler, SamplingParams
from trtbuild.runtime.session import PortableSession, Session
from trtbuild.runtime.token_ring import steps_ahead

NEVER = -1e9  # a score below all others
NONE = -1  # where a sequence has no token yet


class Hypothesis(NamedTuple):
    """A continuation, and the sum of its tokens' log probabilities, divided by its length to the `length_penalty`."""

    output_ids: list[int]
    score: float


@torch.inference_mode()
def beam_search(session: Session, prompts: list[list[int]], params: SamplingParams) -> list[list[Hypothesis]]:
    """The best `num_return_sequences` of each prompt, best first.

    Each prompt has `num_beams` neighbouring slots of the session. A step continues its beams by the likeliest tokens of
    all of them; those that end here are kept if they are among the `num_beams` best that have ended. A prompt is done
    when it has so many and none that goes on can be better, as far as `early_stopping` looks: True does not look,
    False takes a beam's score as it is now, "never" the best that it may come to. Raises `UserError` for a session that
    has no beams, and where numbers are not finite.
    """
    if not isinstance(session, PortableSession):
        raise UserError(f"runtime {session.kind} has no beam search; use --runtime portable")
    count, beams, most, vocab = len(prompts), params.num_beams, params.max_output_len, session.vocab_size
    if count * beams > session.limits.max_batch_size:
        raise UserError(
            f"{beams} beams of {count} prompts are more than the engine's max_batch_size "
            f"{session.limits.max_batch_size}; ask for fewer, or build with a larger --max-batch-size"
        )
    device, penalty, early_stopping = session.device, params.length_penalty, params.early_stopping
    ends = torch.tensor(params.eos_token_ids, dtype=torch.int64, device=device)
    slots = [prompt for prompt in prompts for _ in range(beams)]
    first_slots = beams * torch.arange(count, device=device)[:, None]
    shortest = min(map(len, prompts))  # what is before is the same in all beams of a prompt

    logits = session.prefill(prompts).repeat_interleave(beams, 0)
    first_logits = logits.sum()
    session.multiply(beams)
    sampler = Sampler(params.kind, len(slots), vocab, device).start(params, slots)
    running = torch.full((count, beams, most), NONE, dtype=torch.int32, device=device)
    scores = torch.full((count, beams), NEVER, device=device)
    ended, ended_scores = running.clone(), scores.clone()
    scores[:, 0] = 0  # at first all beams of a prompt are the same
    done = torch.zeros(count, 1, dtype=torch.bool, device=device)
    for length in range(1, most + 1):
        log_probs = sampler.processed(logits.log_softmax(-1)).view(count, beams, vocab) + scores[..., None]
        # So many that as many as there are beams go on, whatever ends.
        best, places = log_probs.flatten(1).topk(max(2, 1 + len(ends)) * beams)
        parents, tokens = places // vocab, places % vocab
        candidates = running.take_along_dim(parents[..., None], 1)
        candidates[..., length - 1] = tokens
        at_end = torch.isin(tokens, ends) | (length == most)

        counts = at_end & ~done
        counts[:, beams:] = False
        ended_scores = torch.cat((ended_scores, (best / length**penalty).masked_fill(~counts, NEVER)), 1)
        ended_scores, kept = ended_scores.topk(beams)
        ended = torch.cat((ended, candidates), 1).take_along_dim(kept[..., None], 1)

        scores, kept = best.masked_fill(at_end, NEVER).topk(beams)
        full = ended_scores[:, -1:] > NEVER
        reach = most if early_stopping == "never" and penalty > 0 else length
        done |= full & ((early_stopping is True) | (scores[:, :1] / reach**penalty <= ended_scores[:, -1:]))
        if length == most or (length % steps_ahead(device) == 0 and bool(done.all())):
            break
        running = candidates.take_along_dim(kept[..., None], 1)
        rows = (first_slots + parents.take_along_dim(kept, 1)).flatten()
        chosen = tokens.take_along_dim(kept, 1).flatten().int()
        sampler.follow(rows, chosen)
        session.rearrange(rows, shortest)
        logits = session.decode(chosen)
    going = (~done).expand(count, beams).flatten()
    session.check_finite(slots, torch.stack((first_logits, logits[going].sum())))
    return [
        [
            Hypothesis([token for token in ids if token != NONE], score)
            for ids, score in zip(own_ids[: params.num_return_sequences], own_scores, strict=False)
        ]
        for own_ids, own_scores in zip(ended.tolist(), ended_scores.tolist(), strict=True)
    ]
