"""Tokens on their way to the host, a few steps at a time, so that the device never waits for it."""

import numpy as np
import torch

AHEAD = 4  # steps that a GPU is given before the first one's tokens are looked at; of these up to 3 are for nothing


def steps_ahead(device: torch.device) -> int:
    """One on a CPU, where a step for nothing would cost its full time."""
    return AHEAD if device.type == "cuda" else 1


class TokenRing:
    """`buffer`, int32 `[ahead, batch]` in the host's memory, to which the device writes the tokens of each step.

    A sequence's token is in the row of its place in the sequence, modulo `ahead`, which is how many steps may be under
    way.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.ahead = steps_ahead(device)
        self.buffer = torch.zeros(self.ahead, batch, dtype=torch.int32, pin_memory=cuda)
        self._host, self._columns = self.buffer.numpy(), np.arange(batch)
        self._events = [torch.cuda.Event() for _ in range(self.ahead if cuda else 0)]
        self.start([0] * batch)

    def start(self, lengths: list[int]) -> None:
        """For new sequences of these lengths, whose first tokens come next."""
        self._lengths = np.array(lengths)
        self.sent = self.received = 0

    def send(self) -> None:
        """A step has been launched."""
        if self._events:
            self._events[self.sent % self.ahead].record()
        self.sent += 1

    @property
    def full(self) -> bool:
        return self.sent == self.received + self.ahead

    def receive(self) -> list[list[int]]:
        """Waits for the oldest step that is under way; its tokens, and those of all others that have ended by then."""
        steps: list[list[int]] = []
        while self.received < self.sent:
            if self._events:
                event = self._events[self.received % self.ahead]
                if steps and not event.query():
                    break
                event.synchronize()
            rows = (self._lengths + self.received) % self.ahead
            steps.append(self._host[rows, self._columns].tolist())
            self.received += 1
        return steps
