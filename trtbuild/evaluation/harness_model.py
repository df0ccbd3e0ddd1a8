"""A session as lm-evaluation-harness wants a model: log-likelihoods of continuations, and texts up to a stop.

Texts become tokens as in the harness's own adapter of `transformers`, special tokens' names included, so that scores
are like those that others publish. The harness is the extra `lm-eval`, which `tasks.py` and this file alone import.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from trtbuild.errors import UserError
from trtbuild.network.step import Chunk
from trtbuild.progress import item_bar
from trtbuild.runtime.generation import generate
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import Session

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Request = tuple[Any, list[int], list[int]]  # a name, context and continuation
SAMPLING = {"temperature", "top_k", "top_p", "repetition_penalty", "num_beams", "length_penalty", "early_stopping"}


class TransformersLM(HFLM):
    """The harness's own adapter, with an engine's lengths. One prompt at a time: batches pad, which moves last bits."""

    def __init__(self, model: "PreTrainedModel", tokenizer: Any, max_input_len: int, max_output_len: int) -> None:
        length = max_input_len + max_output_len
        super().__init__(model, tokenizer=tokenizer, backend="causal", batch_size=1, max_length=length)
        self._max_input_len, self._max_output_len = max_input_len, max_output_len

    @property
    def max_gen_toks(self) -> int:
        return self._max_output_len

    def tok_batch_encode(self, strings: list[str], left_truncate_len: int | None = None, **options: Any) -> Any:
        room = min(left_truncate_len or self._max_input_len, self._max_input_len)
        return super().tok_batch_encode(strings, left_truncate_len=room, **options)


class Piece(NamedTuple):
    """A step's part of a sequence, and the requests that its logits answer, from which token of theirs on; or none."""

    chunk: Chunk
    requests: tuple[int, ...] = ()
    first: int = 0


class SessionLM(TemplateLM):
    """An engine: batches of as many contexts as it has slots, each of which is run once for all its continuations."""

    def __init__(self, session: Session, tokenizer: Any) -> None:
        super().__init__()
        self.session, self.tokenizer = session, tokenizer
        self.max_length, self.max_gen_toks = session.limits.max_length, session.limits.max_output_len

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Raises `UserError` for an answer without text, of which the harness's own adapter says nothing either."""
        for request in requests:
            context, continuation = request.args
            if not continuation:
                raise UserError(f"a task has an empty answer (continuation), after {context[-60:]!r}; give it text")
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token in one window of at most `max_length`."""
        windows: list[Request] = []
        for i, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(i, *make_disjoint_window(window)) for window in rolling]
        totals = [0.0] * len(requests)
        for (i, _, _), (total, _) in zip(windows, self._loglikelihood_tokens(windows), strict=True):
            totals[i] += total
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: Sequence[Request], **kwargs: Any) -> list[tuple[float, bool]]:
        """Log-likelihood (nats) of each continuation, and whether it is what greedy generation would give.

        Contexts are cut on the left to what the engine holds. Raises `UserError` for a context or continuation without
        tokens, for a continuation that the engine does not hold, and where logits are not finite.
        """
        continuations = [continuation for _, _, continuation in requests]
        by_context: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (texts, context, continuation) in enumerate(requests):
            if not (context and continuation):
                empty = "continuation" if context else "context"
                raise UserError(f"a task has a {empty} without tokens in {texts!r:.80}; give it text that is not blank")
            whole = (context + continuation)[-(self.max_length + 1) :]
            if len(whole) <= len(continuation):
                raise UserError(
                    f"a task has a continuation of {len(continuation)} tokens, and the engine's max_length is "
                    f"{self.max_length}; build with a larger max_input_len"
                )
            by_context[tuple(whole[: len(whole) - len(continuation)])].append(i)
        longest_first = sorted(by_context, key=len, reverse=True)
        totals, greedy = [0.0] * len(requests), [True] * len(requests)
        slots = self.session.limits.max_batch_size
        with item_bar(len(longest_first), "lm-eval", "context") as bar:
            for first in range(0, len(longest_first), slots):
                batch = longest_first[first : first + slots]
                work = [
                    self._pieces(slot, context, {i: continuations[i] for i in by_context[context]})
                    for slot, context in enumerate(batch)
                ]
                for piece, logits in self._steps(work):
                    scores, best = logits.log_softmax(-1), logits.argmax(-1)
                    for i in piece.requests:
                        targets = torch.tensor(continuations[i][piece.first : piece.first + len(logits)])
                        targets = targets.to(logits.device)
                        totals[i] += scores.gather(1, targets[:, None]).double().sum().item()
                        greedy[i] &= bool((best == targets).all())
                bar.update(len(batch))
        if not torch.tensor(totals).isfinite().all():
            raise UserError("logits are not finite; where that is float16, use bfloat16")
        return list(zip(totals, greedy, strict=True))

    def _pieces(self, slot: int, context: tuple[int, ...], continuations: dict[int, list[int]]) -> Iterator[Piece]:
        """A context but for its last token, then, each from there on, what differs in its continuations.

        Those that differ in their last token alone, which nothing follows, are one.
        """
        size, start = self.session.limits.max_input_len, len(context) - 1
        for i in range(0, start, size):
            yield Piece(Chunk(context[i : min(i + size, start)], len(context), i, slot))
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, continuation in continuations.items():
            alike[tuple(continuation[:-1])].append(number)
        for before, numbers in alike.items():
            tokens = (context[-1], *before)
            for i in range(0, len(tokens), size):
                chunk = Chunk(tokens[i : i + size], len(context), start + i, slot, all_logits=True)
                yield Piece(chunk, tuple(numbers), i)

    def _steps(self, work: list[Iterator[Piece]]) -> Iterator[tuple[Piece, torch.Tensor]]:
        """Runs all slots' pieces, those of a slot in order; each that answers requests with its logits.

        In one step no more rows have logits than one prompt has tokens.
        """
        waiting = {slot: piece for slot, pieces in enumerate(work) if (piece := next(pieces, None))}
        while waiting:
            step: list[Piece] = []
            rows = 0
            for piece in waiting.values():
                wanted = len(piece.chunk.tokens) if piece.requests else 0
                if rows + wanted <= self.session.limits.max_input_len:
                    step.append(piece)
                    rows += wanted
            logits = self.session.step([piece.chunk for piece in step])
            sizes = [len(piece.chunk.tokens) if piece.requests else 1 for piece in step]
            for piece, part in zip(step, logits.split(sizes), strict=True):
                if piece.requests:
                    yield piece, part
                slot = piece.chunk.slot
                if (following := next(work[slot], None)) is None:
                    del waiting[slot]
                else:
                    waiting[slot] = following

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Raises `UserError` for an option that generation has not, and for more tokens than the engine gives."""
        texts: dict[int, str] = {}
        alike: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[repr(request.args[1])].append(i)
        for indices in alike.values():
            options = normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks)
            length, drawn = options.pop("max_gen_toks"), options.pop("do_sample", False)
            until = handle_stop_sequences(options.pop("until", None), eos=self.tokenizer.decode(self.eot_token_id))
            if unknown := options.keys() - SAMPLING:
                raise UserError(
                    f"a task generates with {', '.join(sorted(unknown))}; known are {', '.join(sorted(SAMPLING))}"
                )
            if not drawn:
                options = {key: value for key, value in options.items() if key not in ("temperature", "top_k", "top_p")}
            if length > self.max_gen_toks:
                raise UserError(
                    f"a task generates {length} tokens, and the engine's max_output_len is {self.max_gen_toks}; "
                    f"build with max_output_len {length}"
                )
            room = min(self.session.limits.max_input_len, self.max_length - length)
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in indices]
            if [] in prompts:
                raise UserError("a task has an empty prompt, and the tokenizer begins none with a token; give it text")
            stop_words = tuple(word for word in until if word)
            params = SamplingParams(length, stop_words=stop_words, eos_token_ids=(self.eot_token_id,), **options)
            with item_bar(len(prompts) * length, "lm-eval", "token") as bar:
                outputs = generate(self.session, prompts, params, self.tokenizer.decode, lambda *_: bar.update())
            for i, output in zip(indices, outputs, strict=True):
                text = self.tokenizer.decode(output.output_ids, skip_special_tokens=True)
                texts[i] = postprocess_generated_text(text, until, None)
        return [texts[i] for i in range(len(requests))]
