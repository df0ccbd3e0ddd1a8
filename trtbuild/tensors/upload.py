"""Stored tensors on their way to a GPU, through page-locked memory, ahead of the asking."""

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from trtbuild.tensors.lazy import LazyTensor

CHUNK = 16 << 20  # bytes that are read, and copied, at a time
WINDOW = 512 << 20  # bytes on the GPU that nobody has asked for yet
READERS = 4  # threads; one reads its next chunk while its last one is being copied
Read = Callable[[int, memoryview], None]
Event = torch.cuda.Event


class Upload:
    """Some tensors, `take`n one after the other in the order of `names`; each is there once, and only until then here.

    Of computed ones, which no file has as they are, nothing is done ahead.
    """

    def __init__(
        self,
        tensors: Mapping[str, LazyTensor],
        names: Sequence[str],
        device: torch.device,
        stage: "Callable[[torch.device], Stage] | None" = None,
    ) -> None:
        self.tensors, self.device = tensors, device
        stored = [name for name in names if hasattr(tensors[name].load, "read_into")]
        self._ahead, self._bytes_ahead = deque(stored), 0
        self._coming: dict[str, tuple[torch.Tensor, list[Future[Event | None]]]] = {}
        self._own, self._stage = threading.local(), stage or Stage
        self._readers = ThreadPoolExecutor(READERS, "reader")

    def take(self, name: str) -> torch.Tensor:
        """A tensor, which the current stream may read. Raises `UserError` where its file has become shorter."""
        self._read_ahead(name)
        if name not in self._coming:
            return self.tensors[name].load().to(self.device)
        memory, chunks = self._coming.pop(name)
        for chunk in chunks:
            if (copied := chunk.result()) is not None:
                torch.cuda.current_stream(self.device).wait_event(copied)
        self._bytes_ahead -= memory.nbytes
        self._read_ahead()
        return memory.view(self.tensors[name].dtype).view(self.tensors[name].shape)

    def close(self) -> None:
        self._readers.shutdown(cancel_futures=True)

    def _read_ahead(self, wanted: str | None = None) -> None:
        """Starts as many as the window takes, and the one that is wanted."""
        while self._ahead and (self._bytes_ahead < WINDOW or wanted in self._ahead):
            name = self._ahead.popleft()
            tensor = self.tensors[name]
            memory = torch.empty(tensor.nbytes, dtype=torch.uint8, device=self.device)
            # What the memory was before may still be read by kernels that run.
            free = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
            starts = range(0, tensor.nbytes, CHUNK)
            read: Read = tensor.load.read_into  # type: ignore[attr-defined]
            chunks = [self._readers.submit(self._send, read, i, memory[i : i + CHUNK], free) for i in starts]
            self._coming[name] = memory, chunks
            self._bytes_ahead += tensor.nbytes

    def _send(self, read: Read, start: int, target: torch.Tensor, free: Event | None) -> Event | None:
        if not hasattr(self._own, "stage"):
            self._own.stage = self._stage(self.device)
        return self._own.stage.send(read, start, target, free)


class Stage:
    """A reader's way to the GPU: two page-locked buffers in turn, and a stream."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.buffers = deque(
            (torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(2)
        )

    def send(self, read: Read, start: int, target: torch.Tensor, free: Event | None) -> Event:
        """Reads bytes from `start` on and copies them to `target` once `free` has passed; the event of its end."""
        self.buffers.rotate()
        buffer, copied = self.buffers[0]
        copied.synchronize()  # what was in it
        part = buffer[: len(target)]
        read(start, part.numpy().data)
        with torch.cuda.stream(self.stream):
            if free is not None:
                self.stream.wait_event(free)
            target.copy_(part, non_blocking=True)
            copied.record()
            return self.stream.record_event()
