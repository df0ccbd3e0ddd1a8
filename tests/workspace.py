"""A folder in which Snakemake runs for real."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

import snakemake_server
import yaml
from journal import Journal

from trtbuild.files import sha256
from trtbuild.quantization.recipe import Recipe

REPOSITORY = Path(__file__).parents[1]
# Every job computes in one thread, so that two run at a time and results are equal to the last bit.
ONE_THREAD = (
    *("calibration", "quantize", "portable_engine", "benchmark"),
    *("summarize", "summarize_hf", "perplexity", "perplexity_hf"),
)


def interruptible() -> None:
    """For a child that gets Ctrl-C: a shell's background jobs, as this process may be, ignore it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Workspace:
    """A working folder of the workflow: `config`, `models` and `recipes` are written before every run."""

    snakemake: tuple[str, ...] = ("-m", "snakemake")
    profile: tuple[str, ...] = ("--profile", str(REPOSITORY / "profiles" / "default"), "--cores", "2")
    seconds = 1200  # that a run may take, on busy cores too
    journal: Journal | None = None

    def __init__(self, folder: Path, config: dict, models: dict, recipes: dict) -> None:
        self.folder = folder
        # Copies that share no part among themselves either, so that a test can change one recipe.
        self.config, self.models, self.recipes = (json.loads(json.dumps(part)) for part in (config, models, recipes))

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | (self.journal.environment if self.journal else {})

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def recipe(self, name: str) -> Recipe:
        """A recipe as the Snakefile knows it."""
        return Recipe.parse(self.recipes[name])

    def copy(self, folder: Path) -> Self:
        """Results, Snakemake's records and all times included."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return type(self)(folder, self.config, self.models, self.recipes)

    def command(self, *arguments: str) -> list[str]:
        """The command line, after writing the configuration that does not exist yet or that changed."""
        config = self.folder / "config"
        config.mkdir(parents=True, exist_ok=True)
        for name in ("config", "models", "recipes"):
            value = getattr(self, name)
            if value is not None:
                text = value if isinstance(value, str) else yaml.safe_dump(value, sort_keys=False)
                (config / f"{name}.yaml").write_text(text, encoding="utf-8")
        program = [sys.executable, *self.snakemake, "-s", str(REPOSITORY / "Snakefile"), *self.profile]
        threads = ["--set-threads", *(f"{rule}=1" for rule in ONE_THREAD)]
        return [*program, "--directory", str(self.folder), *arguments, *threads]

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        """Runs `snakemake`; `stdout` of the result holds what it wrote to either stream."""
        words = self.command(*arguments)[1 + len(self.snakemake) :]
        return snakemake_server.run(words, self.folder, dict(self.environment), self.seconds)

    def begin(self, said: IO, *arguments: str, **environment: str) -> subprocess.Popen:
        """`snakemake` in a session of its own, to be interrupted and killed; `said` gets what it writes."""
        return subprocess.Popen(
            self.command(*arguments),
            stdout=said,
            stderr=said,
            cwd=self.folder,
            env=self.environment | environment,
            start_new_session=True,
            preexec_fn=interruptible,
        )

    def succeed(self, *arguments: str) -> str:
        """Runs `snakemake`, which has to exit 0, and returns what it wrote."""
        result = self.run(*arguments)
        assert result.returncode == 0, result.stdout
        return result.stdout

    def fail(self, *arguments: str) -> str:
        """Runs `snakemake`, which has to fail without any traceback, and returns what it wrote."""
        result = self.run(*arguments)
        assert result.returncode != 0, result.stdout
        assert "Traceback" not in result.stdout, result.stdout
        return result.stdout

    def pending(self, *arguments: str) -> set[str]:
        """What a run would do, from a dry run: `rule model/recipe` of every job, or `rule model/name` of its output.

        `rule model/recipe rank1` is of a rank but the first. Not among them is what shows all of a model's recipes.
        """
        output = self.succeed("--dry-run", *arguments)
        jobs = set()
        for block in re.split(r"^(?=(?:local)?rule \w+:$)", output, flags=re.MULTILINE)[1:]:
            rule = re.match(r"(?:local)?rule (\w+):", block)[1]
            if wildcards := re.search(r"^    wildcards: (.*)$", block, re.MULTILINE):
                values = dict(item.split("=", 1) for item in wildcards[1].split(", "))
                keys = ("recipe", "run", "quantization", "calibration")
                names = [values[key] + values.get("layout", "") for key in keys if key in values]
                rank = f" rank{values['rank']}" if values.get("rank", "0") != "0" else ""
                jobs.add(" ".join([rule, "/".join([values["model"], *names])]) + rank)
        assert jobs or "Nothing to be done" in output, output
        return {job for job in jobs if job.split()[0] not in ("recipes", "table", "page")}  # they follow all else

    def artifacts(self) -> dict[str, str]:
        """The sha256 of all that runs made, but for logs, times and what is being written under a temporary name."""
        found = {}
        for path in self.results.rglob("*"):
            name = path.relative_to(self.folder)
            if path.is_file() and "logs" not in name.parts and not any(part.startswith(".") for part in name.parts):
                with suppress(FileNotFoundError):  # replaced by a job that goes on
                    found[str(name)] = sha256(path)
        return found
