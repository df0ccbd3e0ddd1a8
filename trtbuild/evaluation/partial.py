"""Outputs of a long run, kept as they come, so that one that was interrupted goes on where it was."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from trtbuild.errors import UserError
from trtbuild.files import atomic, output_path, sha256_of
from trtbuild.runtime.generation import Output


class PartialOutputs:
    """Outputs of some prompts, by number: `there` are those that an interrupted run of the same left; `add` keeps one.

    They lie in a hidden file beside what is made of them: a line that says what was asked, and one an output.
    """

    def __init__(self, path: Path, asked: object, count: int) -> None:
        self.path = path.with_name(f".{path.name}.partial")
        self._head = json.dumps({"asked": sha256_of(asked)})
        self._file: TextIO | None = None  # kept open: where another run replaces it, lines of both are not mixed
        self.there = dict(self._read(count))

    def _read(self, count: int) -> Iterator[tuple[int, Output]]:
        """Whole lines: a kill may have cut off the last one."""
        try:
            head, *lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]
        except (OSError, ValueError):  # there is no file, or no whole line of text in it
            return
        if head != self._head:
            return
        for line in lines:
            index, ids, reason = json.loads(line)
            if index < count:
                yield index, Output(ids, reason)

    def add(self, index: int, output: Output) -> None:
        self.there[index] = output
        if self._file:
            self._file.write(self._line(index))
        else:
            with atomic(self.path) as temporary:
                self._file = open(temporary, "w", encoding="utf-8", buffering=1)  # noqa: SIM115 (closed by `close`)
                self._file.write("".join([self._head, "\n", *map(self._line, self.there)]))

    def close(self) -> None:
        if self._file:
            with suppress(OSError):  # what the disk had no room for is not a whole line
                self._file.close()

    def _line(self, index: int) -> str:
        output = self.there[index]
        return json.dumps([index, output.output_ids, output.finish_reason]) + "\n"


@contextmanager
def partial_outputs(path: Path, asked: object, count: int) -> Iterator[PartialOutputs]:
    """Around what makes `path` of `count` outputs.

    They are kept where that is interrupted, and forgotten once it is made, or where it cannot be made as it was asked.
    """
    partial = PartialOutputs(output_path(path), asked, count)
    try:
        yield partial
    except UserError as error:
        if not isinstance(error.__cause__, OSError):  # of a full disk the user is told as well
            partial.path.unlink(missing_ok=True)
        raise
    finally:
        partial.close()
    partial.path.unlink(missing_ok=True)
