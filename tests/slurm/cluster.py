"""Folders in which Snakemake runs on a Slurm, with a tiny dummy model."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from private_slurm import Slurm
from published_models import TINY
from workflow_config import CONFIG
from workspace import REPOSITORY, Workspace

HERE = Path(__file__).parent
FLOAT16 = {"dtype": "float16", "max_perplexity_increase": 1000}  # the perplexity of random weights means nothing
CALIBRATED = FLOAT16 | {"calibration": {"samples": 32, "length": 32}}
RECIPES = {
    "fp16": FLOAT16,
    "int8kv": CALIBRATED | {"weights": {"dtype": "int8"}, "kv_cache": {"dtype": "int8"}},
    "gptq": CALIBRATED | {"weights": {"dtype": "int4", "method": "gptq", "group_size": 32}},
}
SOURCE = {"dummy": {"config": TINY | {"max_position_embeddings": 2048}, "seed": 1}}
MODELS = {"tiny": {"source": SOURCE, "chat_template": "plain"}}
SECONDS = 900  # in which anything that is waited for happens, on busy cores too


class Cluster(Workspace):
    """A folder whose jobs go to a Slurm. They see `site/`."""

    snakemake = (str(HERE / "snakemake_polling.py"),)
    profile = ("--workflow-profile", str(REPOSITORY / "profiles" / "slurm"), "--latency-wait", "5")
    seconds = 2 * SECONDS
    slurm: Slurm
    resources = ("perplexity:cpus_per_task=1", "summarize:cpus_per_task=1")  # as `ONE_THREAD` for ranks

    def command(self, *arguments: str) -> list[str]:
        return [*super().command(*arguments), "--set-resources", *self.resources]

    @property
    def environment(self) -> dict[str, str]:
        given = super().environment
        return given | {
            "PATH": f"{self.slurm.programs}{os.pathsep}{given['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "site"), given.get("PYTHONPATH")])),
            "RANKS": f"{self.folder}/ranks",
            "HANG": f"{self.folder}/hang",
        }

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            env=self.environment,
            timeout=self.seconds,
        )

    @contextmanager
    def started(self, *arguments: str) -> Iterator[subprocess.Popen]:
        """`snakemake`, which runs meanwhile; its words go to `said.txt`."""
        with open(self.folder / "said.txt", "w", encoding="utf-8") as said:
            controller = self.begin(said, *arguments)
        try:
            yield controller
        finally:
            if controller.poll() is None:
                os.killpg(controller.pid, signal.SIGKILL)
                controller.wait()

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text(encoding="utf-8")

    def hang(self, *outputs: str) -> None:
        """Has jobs wait before they rename these outputs; none: those that wait go on."""
        (self.folder / "hang.reached").unlink(missing_ok=True)
        (self.folder / "hang").write_text("".join(f"{self.folder / output}\n" for output in outputs))

    def wait(self, happened: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while not happened():
            assert time.monotonic() < deadline, f"{what}\n{self.said}\n{self.slurm.jobs('all')}"
            time.sleep(0.1)

    def wait_for_hanging(self) -> None:
        """Until a job waits at each of the outputs."""
        listed, reached = (self.folder / name for name in ("hang", "hang.reached"))
        outputs = listed.read_text().split()
        self.wait(lambda: reached.exists() and {*outputs} <= {*reached.read_text().split()}, f"no job at {outputs}")


def prepare(kind: type[Workspace], folder: Path) -> Workspace:
    """A folder in which nothing has been made, with a configuration that asks for nothing by itself."""
    (folder / "ranks").mkdir(parents=True)
    (folder / "hang").touch()
    evaluation = CONFIG["evaluation"] | {"device": "auto"}  # so that jobs ask for GPUs
    return kind(folder, CONFIG | {"matrix": [], "evaluation": evaluation}, MODELS, RECIPES)
