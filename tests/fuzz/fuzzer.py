"""A damaged case of an original: made, run, and judged by what may happen.

Either all programs end with 0 and a result that is right for what the file now says, or one ends with 2 and one line on
standard error. Nothing hangs, dies, prints a traceback, takes gigabytes or leaves anything behind.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

import mutations
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from oracles import meaning, other_weights, senseless, unusable
from originals import Original, make_originals
from server import Outcome, Server

from trtbuild.engine.config import identify

WEIGHTS = (".safetensors", ".bin", ".pth", ".gguf")
NOISE = re.compile(r"Traceback|Exception ignored|panicked|Segmentation|terminate called")


@dataclass(frozen=True)
class Case:
    """`damage`: file, function of `mutations`, seed. Its text, such as `llama/config.json:values:7`, says it all."""

    original: str
    damage: tuple[tuple[str, str, int], ...]

    def __str__(self) -> str:
        return f"{self.original}/" + "+".join(f"{file}:{kind}:{number}" for file, kind, number in self.damage)

    @classmethod
    def parse(cls, text: str) -> "Case":
        original, _, damage = text.partition("/")
        parts = (part.rsplit(":", 2) for part in damage.split("+"))
        return cls(original, tuple((file, kind, int(number)) for file, kind, number in parts))


@dataclass(frozen=True)
class Failure:
    """`kind` is the same for cases that fail in the same way; `outcome` is the last program's."""

    kind: str
    outcome: Outcome


class Fuzzer:
    """Makes originals in `folder`, and runs damaged copies of them there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, Server()
        self.originals = {original.name: original for original in make_originals(folder / "originals", self.server)}
        self.expected: dict[str, list[Outcome]] = {}
        for original in self.originals.values():
            place = self._place(original, f"expected/{original.name}")
            self.expected[original.name] = outcomes = self._run(original, place)
            assert all(outcome.code == 0 for outcome in outcomes), (original.name, outcomes)

    def close(self) -> None:
        self.server.close()

    def _place(self, original: Original, name: str) -> Path:
        place = self.folder / name
        shutil.rmtree(place, ignore_errors=True)
        for folder in ("out", "tmp"):
            (place / folder).mkdir(parents=True)
        shutil.copytree(original.folder, place / "in")
        return place

    def _run(self, original: Original, place: Path) -> list[Outcome]:
        """The programs, up to the first that does not end with 0."""
        outcomes = []
        for program in original.programs:
            outcomes.append(self.server.run(place, *program))
            if outcomes[-1].code or NOISE.search(outcomes[-1].stderr):
                break
        return outcomes

    def check(self, case: Case) -> Failure | None:
        original = self.originals[case.original]
        place = self._place(original, "case")
        for file, kind, number in case.damage:
            path = place / "in" / file
            getattr(mutations, kind)(path, Random(number))
            if path.name == "rank0.safetensors" and number % 2:
                list_again(path)
        before = listing(place / "in")
        outcomes = self._run(original, place)
        program = original.programs[len(outcomes) - 1][0]
        kind = (
            ("hangs" if outcomes[-1].seconds > self.server.seconds else how_it_ended(outcomes[-1], program))
            or self._left_behind(original, place, before, outcomes)
            or (outcomes[-1].code == 0 and self._wrong_result(original, place, case, outcomes))
        )
        return Failure(f"{case.damage[-1][0].removeprefix('checkpoint/')}: {kind}", outcomes[-1]) if kind else None

    def smallest(self, case: Case) -> tuple[Case, Failure | None]:
        """Checks a case; of one that fails, the part that fails alone."""
        failure = self.check(case)
        for damage in case.damage if failure and len(case.damage) > 1 else ():
            part = Case(case.original, (damage,))
            if alone := self.check(part):
                return part, alone
        return case, failure

    def _left_behind(self, original: Original, place: Path, before: set[str], outcomes: list[Outcome]) -> str | None:
        if changed := before ^ listing(place / "in"):
            return f"the inputs' folder changed: {sorted(changed)[0]}"
        if left := listing(place / "tmp"):
            return f"left in the temporary folder: {sorted(left)[0]}"
        done = outcomes if outcomes[-1].code == 0 else outcomes[:-1]
        words = " ".join(word for program in original.programs[: len(done)] for word in program)
        outputs = set(re.findall(r"\bout/([\w.]+)", words))
        found = {path.name for path in (place / "out").iterdir()}
        if found != outputs:
            return f"outputs are {sorted(found)} instead of {sorted(outputs)}"
        if hidden := list((place / "out").rglob(".*")):
            return f"left in the output: {hidden[0].name}"
        return None

    def _wrong_result(self, original: Original, place: Path, case: Case, outcomes: list[Outcome]) -> str | None:
        files = {file for file, _, _ in case.damage}
        for file in files:
            if what := senseless(place / "in" / file, original.folder / file):
                return f"accepted: {what}"
        if what := unusable(place / "out"):
            return what
        expected = self.folder / "expected" / original.name
        # As text: 0.0 is not -0.0, which is printed otherwise.
        same = all(repr(meaning(place / "in" / file)) == repr(meaning(original.folder / file)) for file in files)
        if same and original.name != "workflow":  # Snakemake lists jobs in any order
            if outcomes[-1].stdout != self.expected[original.name][-1].stdout:
                return "another answer, though the files say the same"
            if weights(place / "out") != weights(expected / "out"):
                return "other weights, though the files say the same"
        if original.layout and all(file.endswith(WEIGHTS) for file in files):
            return other_weights(place / "in", place / "out" / "checkpoint", original.layout)
        return None


def list_again(path: Path) -> None:
    """Engine folders list their files' sizes and checksums; else all damage would be found by these."""
    config = path.with_name("config.json")
    if not (path.is_file() and config.is_file()):
        return
    try:
        content = json.loads(config.read_text())
        content["outputs"][path.name] = identify(path)
    except (KeyError, TypeError, ValueError, OSError, RecursionError):
        return
    config.write_text(json.dumps(content))


def listing(folder: Path) -> set[str]:
    names = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return {name for name in names if not name.startswith(".snakemake")}


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def how_it_ended(outcome: Outcome, program: str) -> str | None:
    """None for 0, and for 2 with one line."""
    if outcome.code < 0:
        return f"dies of signal {-outcome.code}"
    if NOISE.search(outcome.stderr):
        return last_words(outcome.stderr)
    lines = [line for line in re.split(r"[\r\n]+", outcome.stderr) if line and "%|" not in line]  # no progress bars
    if program == "snakemake":
        return None if outcome.code in (0, 1) else f"exit code {outcome.code}"
    if outcome.code == 0:
        return None
    if outcome.code != 2:
        return f"exit code {outcome.code}"
    if len(lines) != 1 or not lines[0].startswith("error: "):
        return f"not one line: {re.sub(r'[0-9]+', 'N', lines[0])[:80] if lines else 'nothing'} ({len(lines)})"
    return "needs gigabytes" if re.search(r"out of memory|allocate", lines[0]) else None


def last_words(text: str) -> str:
    """The exception of a traceback, and the last of our functions in it."""
    ours = re.findall(r'File "[^"]*/(?:trtbuild|rules|workflow_scripts)/([^"]+)", line \d+, in (\S+)', text)
    where = " at {} {}".format(*ours[-1]) if ours else ""
    raised = re.findall(r"^([\w.]+)(?::|$)", text, re.MULTILINE)
    return (raised[-1] if raised else NOISE.search(text)[0]) + where


def search(fuzzer: Fuzzer, count: int, number: int, see: Callable[[Case, Failure | None], None]) -> None:
    """Runs `count` cases drawn from the seed `number`, and shows each to `see`."""
    options = {"database": None, "deadline": None, "phases": [Phase.generate]}

    @seed(number)
    @settings(max_examples=count, suppress_health_check=list(HealthCheck), **options)
    @given(cases(list(fuzzer.originals.values())))
    def run(case: Case) -> None:
        see(*fuzzer.smallest(case))

    run()


@st.composite
def cases(draw, originals: list[Original]) -> Case:
    original = draw(st.sampled_from(originals))
    files = draw(st.lists(st.sampled_from(original.files), min_size=1, max_size=2, unique=True))
    kinds = [draw(st.sampled_from(mutations.damages(file))).__name__ for file in files]
    seeds = [draw(st.integers(0, 2**32 - 1)) for _ in files]
    return Case(original.name, tuple(zip(files, kinds, seeds, strict=True)))
