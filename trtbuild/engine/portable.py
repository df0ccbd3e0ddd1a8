"""The portable engine: a network and its weights in one safetensors file, run with torch on a CPU or a GPU."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.files import atomic
from trtbuild.linear import linear  # noqa: F401 (makes the weight formats' operations known)
from trtbuild.network import Network, ops  # noqa: F401 (makes the operations known)
from trtbuild.tensors.safetensors_stream import open_file, write_file

METADATA_KEY = "trtbuild"
FORMAT_VERSION = 2
WEIGHTS = ("model.", "lm_head.")  # how names of a model's own constants begin; ALiBi's slopes are computed


def write_portable(
    path: Path, network: Network, limits: BuildLimits, progress: Callable[[int], object] = lambda nbytes: None
) -> None:
    """Streams a network's weights, and the network itself as metadata, to `path`; one weight in memory at a time."""
    metadata = {
        "format_version": FORMAT_VERSION,
        "limits": dataclasses.asdict(limits),
        "network": network.to_json(),
    }
    with atomic(path) as temporary:
        write_file(temporary, network.constants, {METADATA_KEY: json.dumps(metadata)}, progress)


def read_portable(path: Path) -> tuple[Network, BuildLimits]:
    """The network of a portable engine file, its weights memory-mapped."""
    tensors, metadata = open_file(path)
    if METADATA_KEY not in metadata:
        raise UserError(f"{path} is a safetensors file but not an engine; build one with 'trtbuild build'")
    content = json.loads(metadata[METADATA_KEY])
    if content["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path} has engine format {content['format_version']}, this version reads {FORMAT_VERSION}; build it again"
        )
    try:
        return Network.from_json(content["network"], tensors), BuildLimits(**content["limits"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds a network that this version cannot read ({error}); build it again") from error


class StepContext:
    """What the host knows of one step, for operations that need more than their tensors.

    `lengths` are the prompts' lengths in the context phase and None in the generation phase, where `kv_bound` is the
    number of cache positions to read and `exact` says that every sequence has exactly that many.
    """

    def __init__(
        self, batch_index: torch.Tensor, lengths: list[int] | None, kv_bound: int, exact: bool = False
    ) -> None:
        self.batch_index = batch_index
        self.lengths = lengths
        self.kv_bound = kv_bound
        self.exact = exact
        self._slots: tuple[torch.Tensor, torch.Tensor] | None = None
        self._mask: torch.Tensor | None = None
        self._alibi: torch.Tensor | None = None

    def slots(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sequence and position, int64, of the cache entry that each sequence's new token takes; made once a step."""
        if self._slots is None:
            self._slots = self.batch_index, position_ids.long()
        return self._slots

    def mask(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """`[batch, 1, 1, kv_bound]` to add to scores: minus infinity beyond a sequence's end; made once a step.

        None where every sequence may look everywhere.
        """
        if self._mask is None and not self.exact:
            device = position_ids.device
            beyond = torch.arange(self.kv_bound, device=device, dtype=torch.int32) > position_ids[:, None]
            mask = torch.zeros(beyond.shape, device=device, dtype=dtype).masked_fill_(beyond, float("-inf"))
            self._mask = mask[:, None, None]
        return self._mask

    def alibi(
        self, position_ids: torch.Tensor, slopes: torch.Tensor, kv_heads: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """ALiBi's biases to add to scores, minus infinity where a query may not look; made once a step.

        Context phase: `[1, heads, n, n]`, n the longest prompt; for a shorter one take what its positions need.
        Generation phase: `[batch, kv_heads, group, kv_bound]`. In `dtype`; float32 on a CPU, where that is free.
        """
        if self._alibi is None:
            device = slopes.device
            keys = torch.arange(self.kv_bound, device=device, dtype=torch.int32)
            if self.lengths is None:
                queries, slopes = position_ids[:, None, None, None], slopes.view(kv_heads, -1, 1)
            else:
                queries, slopes = keys[:, None], slopes[None, :, None, None]
            distances = (keys - queries).float()
            distances.masked_fill_(distances > 0, float("-inf"))
            *rows, width = torch.broadcast_shapes(slopes.shape, distances.shape)
            # Rows start at multiples of 8: of others, fused attention on CUDA would make such a copy in every layer.
            dtype = dtype if slopes.is_cuda else torch.float32
            biases = torch.empty(*rows, -(-width // 8) * 8, device=device, dtype=dtype)[..., :width]
            self._alibi = torch.mul(slopes, distances, out=biases)
        return self._alibi


class PortableEngine:
    """A network prepared once for running: a flat list of bound calls over numbered slots.

    Every weight is mapped from the file and, on a GPU, copied there once.
    """

    def __init__(self, network: Network, limits: BuildLimits, device: torch.device) -> None:
        self.network, self.limits, self.device = network, limits, device
        slots = {name: i for i, name in enumerate(network.tensors)}
        last_use = {name: i for i, node in enumerate(network.nodes) for name in node.inputs}
        keep = {*network.constants, *network.inputs, *network.outputs}
        self._values: list[torch.Tensor | None] = [None] * len(slots)
        for name, constant in network.constants.items():
            self._values[slots[name]] = constant.load().to(device)
        for node in network.nodes:
            constants = [slots[name] for name in node.inputs if name in network.constants]
            prepared = node.op.prepare(device, *(self._values[i] for i in constants))
            for i, value in zip(constants, prepared, strict=True):
                self._values[i] = value
        self._inputs = {name: slots[name] for name in network.inputs}
        self._logits = slots["logits"]
        self._plan = [
            (
                node.op.portable,
                tuple(slots[name] for name in node.inputs),
                tuple(slots[name] for name in node.outputs),
                tuple({slots[name] for name in node.inputs if last_use[name] == i and name not in keep}),
            )
            for i, node in enumerate(network.nodes)
        ]

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu") -> "PortableEngine":
        """Opens an engine file; raises `UserError` if it is missing, truncated, or no engine."""
        return cls(*read_portable(path), torch.device(device))

    @torch.inference_mode()
    def run(self, step: StepContext, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """One step: logits, `[rows, vocab]` float32. The KV caches among `inputs` are updated in place."""
        values = self._values.copy()
        for name, slot in self._inputs.items():
            values[slot] = inputs[name]
        for run, sources, targets, dead in self._plan:
            result = run(step, *[values[i] for i in sources])
            for slot in dead:
                values[slot] = None
            if len(targets) == 1:
                values[targets[0]] = result
            else:
                for slot, value in zip(targets, result, strict=True):
                    values[slot] = value
        return values[self._logits]

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Inside, `run` raises `FloatingPointError` where numbers stop being finite: at which product or norm."""
        plan, last = self._plan, ""
        self._plan = []
        for node, (run, *slots) in zip(self.network.nodes, plan, strict=True):
            weights = [name for name in node.inputs if name in self.network.constants and name.startswith(WEIGHTS)]
            last = weights[0].rpartition(".")[0] if weights else last
            self._plan.append((_checked(run, last), *slots))
        try:
            yield
        finally:
            self._plan = plan


def _checked(run: Callable, name: str) -> Callable:
    def call(step: StepContext, *values: torch.Tensor):
        result = run(step, *values)
        first = result if isinstance(result, torch.Tensor) else result[0]  # others are caches, with unused positions
        if not first.isfinite().all():
            raise FloatingPointError(name)
        return result

    return call
