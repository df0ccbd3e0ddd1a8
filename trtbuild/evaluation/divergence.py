"""How far an engine's next-token distributions are from the baseline's on one text: KL divergence, top-1 agreement.

Every token of a text and all of the vocabulary count, so it tells apart what scores of generated text do not (Dutta et
al. 2024, "Accuracy is Not All You Need", arXiv 2407.09141). The two models run one after the other. What is kept of the
baseline are not its logits but the hidden states that its output product makes them from: they are exact, and smaller
by as much as the vocabulary is larger than a hidden state (docs/architecture.md).
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.errors import UserError
from trtbuild.evaluation.paired import per_token
from trtbuild.evaluation.provenance import refuse_different
from trtbuild.files import atomic, parse_json
from trtbuild.tensors.lazy import FLOATS, from_tensor
from trtbuild.tensors.safetensors_stream import open_file, write_file

ROWS = 64  # of logits at a time in float64


class OutputProduct:
    """What makes a checkpoint's logits of its last, normalized hidden states, in a dtype and on a device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        weight = checkpoint.dequantized(f"{checkpoint.config.output_product}.weight").load().to(dtype)
        self.sha256 = hashlib.sha256(weight.contiguous().view(torch.uint8).numpy().data).hexdigest()
        self.weight = weight.to(device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits, `[tokens, vocab]`, of `[tokens, hidden]`."""
        return torch.nn.functional.linear(hidden.to(self.weight), self.weight).float()


def write_hidden_states(path: Path, states: list[torch.Tensor], product: OutputProduct, origin: dict) -> None:
    """Writes the hidden states of all windows of a text, `[tokens, hidden]` each, one after the other."""
    metadata = {"provenance": json.dumps(origin), "output_product_sha256": product.sha256}
    with atomic(path) as temporary:
        write_file(temporary, {"hidden_states": from_tensor(torch.cat(states))}, metadata)


class Divergence:
    """Compares an engine's logits with those of the baseline, window by window, as the text goes on.

    `path` is what `write_hidden_states` wrote, `checkpoint` the baseline's, which has the output product, and `origin`
    the engine's provenance. Raises `UserError` for a baseline of another model or text.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, device: torch.device, origin: dict) -> None:
        tensors, metadata = open_file(path)
        theirs = parse_json(metadata.get("provenance", "null"), f"{path}: provenance")
        states = tensors.get("hidden_states")
        width = (checkpoint.config.hidden_size,)
        if states is None or states.shape[1:] != width or states.dtype not in FLOATS or not isinstance(theirs, dict):
            raise UserError(f"{path} holds no hidden states of a baseline; make it with 'trtbuild perplexity'")
        refuse_different([{"provenance": origin}, {"provenance": theirs}])
        self.product = OutputProduct(checkpoint, states.dtype, device)
        if self.product.sha256 != metadata.get("output_product_sha256"):
            raise UserError(
                f"{checkpoint.folder} is not the checkpoint that {path} was made of (its output product differs)"
            )
        self.path, self.states, self.baseline = path, states, {key: theirs.get(key) for key in ("engine", "dtype")}
        self._divergences: list[torch.Tensor] = []
        self._same: list[torch.Tensor] = []
        self._articles: list[int] = []  # of each token

    def add(self, article: int, logits: torch.Tensor) -> None:
        """The engine's logits of the next tokens of the text, `[tokens, vocab]`, and which article they are of."""
        if len(self._articles) + len(logits) > self.states.shape[0]:
            raise UserError(f"{self.path} ends before the text does; make it again")
        for ours in logits.split(ROWS):
            theirs = self.product(self.states.narrow(0, len(self._articles), len(ours)).load())
            p, q = (x.double().log_softmax(-1) for x in (theirs, ours))
            self._divergences.append((p.exp() * (p - q)).sum(-1).cpu())
            self._same.append((theirs.argmax(-1) == ours.argmax(-1)).cpu())
            self._articles += [article] * len(ours)

    def result(self) -> dict:
        """Nats, KL(baseline || engine): the mean a token, with its 95% interval over articles, and the 99th percentile.

        And the share of tokens, in per cent, of which both find the same token most likely. Raises `UserError` where
        the text was not the whole one, and for what is not finite.
        """
        if len(self._articles) < self.states.shape[0]:
            raise UserError(f"{self.path} goes on where the text has ended; make it again")
        kl, articles = torch.cat(self._divergences).numpy(), np.array(self._articles)
        if not np.isfinite(kl).all():
            raise UserError(f"{self.path}: logits made of it, or the engine's, are not finite; make it again")
        mean = per_token(np.bincount(articles, kl), np.bincount(articles).astype(float))
        low, high = mean.interval if mean.articles > 1 else (None, None)
        return {
            "mean_kl": mean.mean,
            "low": low,
            "high": high,
            "p99_kl": float(np.quantile(kl, 0.99)),
            "top1_percent": 100 * torch.cat(self._same).double().mean().item(),
            "baseline": self.baseline,
        }
