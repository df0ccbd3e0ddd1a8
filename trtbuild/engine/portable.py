"""The portable engine: a network and its weights in one safetensors file, run with torch on a CPU or a GPU."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trtbuild import kernels
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.fused import FEW, FEW_ROWS, MANY, knows_lengths
from trtbuild.engine.fusion import Fused, fuse
from trtbuild.engine.memory import check_memory
from trtbuild.errors import UserError
from trtbuild.files import atomic
from trtbuild.linear import linear  # noqa: F401 (makes the weight formats' operations known)
from trtbuild.network import Network, Node, Op, ops  # noqa: F401 (makes the operations known)
from trtbuild.network.step import Step, captured_rows
from trtbuild.progress import SHORT, byte_bar
from trtbuild.tensors.safetensors_stream import open_file, write_file
from trtbuild.tensors.upload import Upload

METADATA_KEY = "trtbuild"
FORMAT_VERSION = 3
OnBytes = Callable[[int], object]
Call = tuple[Callable, tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # what runs, slots: read, written, then free
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
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{path} holds a network that this version cannot read ({error}); build it again") from error


class PortableEngine:
    """A network prepared once for running: flat lists of bound calls over numbered slots.

    Every weight is mapped from the file and, on a GPU, copied there once. There the network's nodes run fused, in one
    of two ways, by the number of a step's rows; all share slots and weights. A network of several ranks needs a step
    that leads to the others. `loaded(nbytes)` is called as each weight is there. Raises `UserError` for a network that
    a GPU's memory does not hold.
    """

    def __init__(
        self, network: Network, limits: BuildLimits, device: torch.device, loaded: OnBytes = lambda nbytes: None
    ) -> None:
        self.network, self.limits, self.device = network, limits, device
        if device.type == "cuda":
            check_memory(network, limits, free_memory(device))
        elif device.type == "cpu":
            keep_freed_memory()
        self.few = self.many = network
        if kernels.run_on(device):
            self.few, self.many = fuse(network, FEW), fuse(network, MANY)
        names = [name for name in network.tensors if name not in network.constants]
        self._slots = {name: i for i, name in enumerate(names)}
        self._values: list[torch.Tensor | None] = [None] * len(names)
        self._inputs = {name: self._slots[name] for name in network.inputs}
        self._logits = self._slots.get("logits", ABSENT)
        constants = _Constants(network, device, self._values, loaded)
        try:
            self._plans = {kind: self._plan(kind, constants) for kind in dict.fromkeys((network, self.few, self.many))}
        finally:
            constants.close()
        self._values.append(None)  # `ABSENT`
        knows = kernels.run_on(device) and knows_lengths(self.few, device)
        self._captured_rows = captured_rows(network) if knows else 0
        self._search: list[Call] = []  # what runs in the place of a plan

    def _plan(self, network: Network, constants: "_Constants") -> list[Call]:
        """The calls of a step."""
        plan, last_uses = [], network.last_uses()
        for i, node in enumerate(network.nodes):
            inputs = {parameter: self._slots[x] for parameter, x in node.inputs.items() if x in self._slots}
            read = {x for x in node.inputs.values() if x in self._slots and x not in self._inputs}
            dead = tuple(self._slots[x] for x in read if last_uses[x] == i)
            targets = tuple(self._slots[x] for x in node.outputs)
            plan.append((*_bound(node.op, inputs | constants.of(node)), targets, dead))
            constants.forget(x for x in node.inputs.values() if last_uses[x] == i)
        return plan

    @classmethod
    def load(cls, path: Path, device: torch.device | str = "cpu", show: bool = False) -> "PortableEngine":
        """Opens an engine file, with `show` under a bar where that takes long.

        Raises `UserError` if it is missing, truncated, or no engine.
        """
        network, limits = read_portable(path)
        if not show:
            return cls(network, limits, torch.device(device))
        total = sum(constant.nbytes for constant in network.constants.values())
        with byte_bar(total, f"{path.name} to {device}", SHORT) as bar:
            return cls(network, limits, torch.device(device), bar.update)

    @torch.inference_mode()
    def run(self, step: Step, inputs: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """One step: logits, `[rows, vocab]` float32; None of a pipeline's stage before the last.

        The KV caches among `inputs` are updated in place.
        """
        values = self._values.copy()
        for name, slot in self._inputs.items():
            values[slot] = inputs[name]
        rows = len(inputs[self.network.inputs[0]])
        plan = self._search or self._plans[self.few if rows <= FEW_ROWS else self.many]
        for run, sources, targets, dead in plan:
            result = run(step, *[values[i] for i in sources])
            for slot in dead:
                values[slot] = None
            if len(targets) == 1:
                values[targets[0]] = result
            else:
                for slot, value in zip(targets, result, strict=True):
                    values[slot] = value
        return values[self._logits]

    @property
    def captured_rows(self) -> int:
        """Rows of the longest step of chunks that is worth a captured graph; 0 where the host has to know chunks."""
        return 0 if self._search else self._captured_rows

    @contextmanager
    def checked(self) -> Iterator[None]:
        """Inside, `run` ends with `NotFinite` where numbers stopped being finite; nothing is fused.

        Not before its end: other ranks are in the same step.
        """
        last, names = "", dict.fromkeys(self.network.states.values())  # caches have positions never written to
        found: list[tuple[str, int]] = []
        search: list[Call] = []
        for node, (run, sources, targets, dead) in zip(self.network.nodes, self._plans[self.network], strict=True):
            weights = [x for x in node.inputs.values() if x in self.network.constants and x.startswith(WEIGHTS)]
            last = weights[0].rpartition(".")[0] if weights else last
            places = [(names.get(x, last), len(search)) for x in node.outputs]
            search.append((_checked(run, places, found), sources, targets, dead))

        def finish(step: Step) -> tuple:
            if found:
                raise NotFinite(*found[0])
            return ()

        self._search = [*search, (finish, (), (), ())]
        try:
            yield
        finally:
            self._search = []


def keep_freed_memory() -> None:
    """Has the C library keep up to 64 MB of what a step frees for the next one, and not map them anew, page by page.

    glibc learns that from the largest mapped block that was freed, of up to 32 MB.
    """
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8)


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that nothing has, or torch alone and without a use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


class NotFinite(FloatingPointError):
    """Where numbers stopped being finite: `str()` is the product or norm, `node` its place in the network."""

    def __init__(self, name: str, node: int) -> None:
        super().__init__(name)
        self.node = node


ABSENT = -1  # the last slot, which stays empty: of an input that a node does not have


def _bound(op: Op, sources: dict[str, int]) -> tuple[Callable, tuple[int, ...]]:
    """What a step calls, and the slots of its arguments in order; absent ones at the end are left out."""
    order = [sources.get(parameter, ABSENT) for parameter in op.parameters]
    while order and order[-1] == ABSENT:
        order.pop()
    return op.portable, tuple(order)


class _Constants:
    """Puts a network's constants into slots of `values`, as each operation's `prepare` wants them.

    Operations that want one layout share it; the original stays only where somebody reads it as it is.
    """

    def __init__(
        self, network: Network, device: torch.device, values: list[torch.Tensor | None], loaded: OnBytes
    ) -> None:
        self.constants, self.device, self.values = network.constants, device, values
        self._tell, self._told = loaded, set[str]()
        used = [name for node in network.nodes for name in node.inputs.values() if name in network.constants]
        self._upload = Upload(network.constants, list(dict.fromkeys(used)), device) if device.type == "cuda" else None
        self._loaded: dict[str, torch.Tensor] = {}
        self._slots: dict[str, int] = {}  # of constants as they are
        self._prepared: dict[tuple, dict[str, int]] = {}

    def of(self, node: Node) -> dict[str, int]:
        """Slots of a node's constants by parameter; of a fused one's, those that its parts have."""
        if isinstance(node.op, Fused):
            return {
                node.op.name_of(part, parameter): slot
                for part in node.op.nodes
                for parameter, slot in self.of(part).items()
            }
        names = {parameter: name for parameter, name in node.inputs.items() if name in self.constants}
        key = node.op, *sorted(names.items())
        if key not in self._prepared:
            for name in names.values():
                if name not in self._loaded:
                    self._loaded[name] = self._upload.take(name) if self._upload else self.constants[name].load()
                if name not in self._told:  # nodes that want it in another layout may load it again
                    self._told.add(name)
                    self._tell(self.constants[name].nbytes)
            given = {parameter: self._loaded[name] for parameter, name in names.items()}
            prepared = node.op.prepare(self.device, **given)
            self._prepared[key] = {
                parameter: self._slot(value, names[parameter] if value is given[parameter] else None)
                for parameter, value in prepared.items()
            }
        return self._prepared[key]

    def close(self) -> None:
        """When all have been asked for, or will not be."""
        if self._upload:
            self._upload.close()

    def forget(self, names: Iterable[str]) -> None:
        """Of constants that no later node reads, drops what is in no slot."""
        for name in names:
            self._loaded.pop(name, None)

    def _slot(self, value: torch.Tensor, name: str | None) -> int:
        if name in self._slots:
            return self._slots[name]
        self.values.append(value)
        if name:
            self._slots[name] = len(self.values) - 1
        return len(self.values) - 1


def _checked(run: Callable, places: list[tuple[str | None, int]], found: list[tuple[str, int]]) -> Callable:
    """`run`, which adds to `found` the places, where they have names, of those of its results that are not finite."""

    def call(step: Step, *values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        result = run(step, *values)
        for x, (name, node) in zip(result if isinstance(result, tuple) else (result,), places, strict=True):
            if name is not None and not x.isfinite().all():
                found.append((name, node))
        return result

    return call
