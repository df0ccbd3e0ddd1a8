"""One controller a folder, and no job beside another one's: a lock that knows whether its holder lives.

Snakemake's own lock stays when its holder is killed, until somebody removes it by hand. This one is a record of each
process in `.snakemake/trtbuild`: of the controller (the `snakemake` that a user starts), and of every job. A process
of this machine lives while it runs, a Slurm job while Slurm says so, any other while its record's time goes on.

- A controller takes the next number, which only one can create, once the last one has ended. Then it waits for that
  one's jobs: those in a batch system outlive it, and what they make is recorded by themselves (`kept_outputs`).
- A job makes its record and then looks at who has the folder. A controller takes the folder and then looks at the jobs.
  So one of the two sees the other: a job that comes too late ends before it has touched anything.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

from trtbuild.errors import UserError
from trtbuild.files import write_json
from trtbuild.processes import Process

RECORDS = Path(".snakemake/trtbuild")
RUN, RECORDED = "TRTBUILD_RUN", "TRTBUILD_JOB"  # environment variables: a job's run; whether it has a record already
BEAT, SILENT = 10, 120  # seconds between a record's times; without a new one another host's process counts as dead
PATIENCE, REPEAT = 3, 60  # seconds before the first word on what is waited for, and between others

Say = Callable[[str], object]


@contextmanager
def held(records: Path, say: Say, latency: float = 0, slurm: bool = False) -> Iterator[str]:
    """Holds a folder for a controller, once all jobs of earlier ones have ended; yields the name of this run.

    `latency` are seconds after which files of other hosts are seen; with `slurm` jobs are submitted under that name.
    Raises `UserError` where another controller lives.
    """
    run = uuid4().hex[:12]
    try:
        records.mkdir(parents=True, exist_ok=True)
        mine, ended = _take(records, {"run": run, "queues": slurm}, say)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    try:
        with _beating(mine, lambda: _stop_if_replaced(mine, say)):
            try:
                for path in ended:
                    _cancel_queued(_read(path), say)
                if _wait_for_jobs(records, say):
                    time.sleep(latency)
                for path in ended:
                    path.unlink(missing_ok=True)
            except KeyboardInterrupt:
                raise UserError("interrupted") from None
            yield run
    finally:
        if mine.exists():
            write_json(mine, (_read(mine) or {}) | {"ended": True})  # not removed: numbers go up


def _take(records: Path, new: dict, say: Say) -> tuple[Path, list[Path]]:
    """Makes the record of a controller; returns it, and those of earlier ones."""
    life, said = Life(), False
    while True:
        *_, last = [None, *_controllers(records)]
        record = _read(last) if last else None
        if last and not (record and record.get("ended")):
            alive = life.of(last, record)
            if alive:
                raise UserError(
                    f"another snakemake runs in this folder: {_who(record)}; wait for it, or end it and start again"
                )
            if alive is None:
                if not said:
                    say(
                        f"another snakemake has run in this folder, {_who(record)}; waiting {SILENT} s for a sign of it"
                    )
                said = True
                time.sleep(1)
                continue
        mine = records / f"controller.{_number(last) + 1 if last else 1}.json"
        try:
            _create(mine, new)
        except FileExistsError:
            continue
        *ended, newest = _controllers(records)
        if newest == mine:
            return mine, ended
        mine.unlink()


@contextmanager
def recorded(what: str, run: str, slurm: str | None = None) -> Iterator[dict | None]:
    """Around a job of a `run`, in the working folder; yields its controller's record.

    Raises `UserError` where another controller has the folder.
    """
    RECORDS.mkdir(parents=True, exist_ok=True)
    mine = RECORDS / f"job.{uuid4().hex[:12]}.json"
    _create(mine, {"run": run, "what": what, "slurm": slurm})
    try:
        # One that is not yet written is of a controller that will look at this job's.
        holder = next(filter(None, map(_read, reversed(_controllers(RECORDS)))), None)
        if holder and holder["run"] != run:
            raise UserError(f"{what}: the snakemake that started this job has ended, and another one has the folder")
        with _beating(mine):
            yield holder
    finally:
        mine.unlink(missing_ok=True)


@contextmanager
def local_job(what: str) -> Iterator[None]:
    """`recorded`, for a job that is ended with its controller, as by Ctrl-C: all but those of a batch system."""
    run = os.environ.get(RUN)
    if run is None or RECORDED in os.environ:
        yield
        return
    with recorded(what, run) as holder:
        if holder:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            threading.Thread(target=_end_with, args=(Process(**holder["process"]),), daemon=True).start()
        yield


def one_controller() -> None:
    """Has Snakemake, in this process, hold the folder while it executes, or record the job that it executes on a node.

    There is no hook before a run looks at what there is to do, so a method is wrapped. Should it go, no run begins.
    """
    from snakemake.exceptions import ApiError
    from snakemake.logging import logger
    from snakemake.workflow import Workflow

    execute = Workflow.execute

    def batch_job(workflow: Any) -> AbstractContextManager:
        run = os.environ.get(RUN)
        if run is None or RECORDED in os.environ:  # of a job's Snakemake, which starts another one
            return nullcontext()
        os.environ[RECORDED] = "1"
        (job, *_) = workflow.dag_settings.target_jobs
        what = f"{job.rulename} {'/'.join(filter(None, job.wildcards_dict.values()))}"
        return recorded(what, run, os.environ.get("SLURM_JOB_ID"))

    @contextmanager
    def controller(workflow: Any, settings: Any) -> Iterator[None]:
        slurm = hasattr(settings, "jobname_prefix")  # of jobs' names
        with held(RECORDS, logger.warning, workflow.execution_settings.latency_wait, slurm) as run:
            os.environ[RUN] = run
            os.environ.pop(RECORDED, None)
            workflow.register_envvars(RUN)
            workflow.execution_settings.lock = False  # Snakemake's own would outlive a kill
            if slurm:
                settings.jobname_prefix = "_".join(filter(None, [settings.jobname_prefix, run]))[-50:]
            yield

    def execute_alone(workflow: Any, executor_plugin: Any, executor_settings: Any, **options: Any) -> Any:
        arguments = {"executor_plugin": executor_plugin, "executor_settings": executor_settings} | options
        if executor_plugin.common_settings.dryrun_exec or workflow.subprocess_exec:
            return execute(workflow, **arguments)
        try:
            with batch_job(workflow) if workflow.remote_exec else controller(workflow, executor_settings):
                return execute(workflow, **arguments)
        except UserError as error:
            raise ApiError(str(error)) from None  # of which Snakemake prints one line

    Workflow.execute = execute_alone


class Life:
    """Whether processes live, looked at again and again."""

    def __init__(self) -> None:
        self._times: dict[Path, tuple[int, float]] = {}  # a record's time, and when it was seen first
        self._beats: set[Path] = set()

    def of(self, path: Path, record: dict | None, slurm: set[str] | None = None) -> bool | None:
        """None: not known yet. `slurm` are the jobs that Slurm has, if it says so."""
        if record:
            runs = Process(**record["process"]).runs()
            if runs:
                return True
            if slurm is not None and record.get("slurm"):
                return record["slurm"] in slurm
            if runs is False:
                return False
        try:
            with open(path, "rb") as file:  # on NFS opening asks the server, `stat` may not
                beat = os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return False
        now = time.monotonic()
        last, since = self._times.get(path, (beat, now))
        if beat != last:
            self._beats.add(path)
            since = now
        self._times[path] = beat, since
        if now - since > SILENT:
            return False
        return True if path in self._beats else None


def _wait_for_jobs(records: Path, say: Say) -> bool:
    """Returns whether one of another machine was waited for."""
    elsewhere = False
    life, start, said, pause = Life(), time.monotonic(), -1.0 * REPEAT, 0.1
    while True:
        jobs = {path: _read(path) for path in records.glob("job.*.json")}
        slurm = _slurm_jobs() if any(job and job.get("slurm") for job in jobs.values()) else None
        for path in [path for path, job in jobs.items() if life.of(path, job, slurm) is False]:
            path.unlink(missing_ok=True)
            del jobs[path]
        if not jobs:
            return elsewhere
        elsewhere |= any(job and Process(**job["process"]).runs() is None for job in jobs.values())
        waited = time.monotonic() - start
        if waited > PATIENCE and waited - said > REPEAT:
            said = waited
            ids = [job["slurm"] for job in jobs.values() if job and job.get("slurm")]
            cancel = f": scancel {' '.join(ids)}" if ids else ""
            say(
                f"waiting for jobs that outlived their snakemake: {'; '.join(map(_who, jobs.values()))}. "
                f"What they make is kept; to begin at once, end them{cancel}"
            )
        time.sleep(pause)
        pause = min(BEAT, 1.5 * pause)


def _controllers(records: Path) -> list[Path]:
    return sorted(records.glob("controller.*.json"), key=_number)


def _number(controller: Path) -> int:
    return int(controller.name.split(".")[1])


def _create(path: Path, record: dict) -> None:
    """Raises `FileExistsError`; only one process can make a file, on NFS too."""
    with open(path, "x", encoding="utf-8") as file:
        json.dump(record | {"process": asdict(Process.current()), "since": time.strftime("%F %T")}, file)


def _read(path: Path) -> dict | None:
    """A record; None where it is gone, or being written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def _who(record: dict | None) -> str:
    if not record:
        return "which has just begun"
    where = f"Slurm job {record['slurm']}" if record.get("slurm") else str(Process(**record["process"]))
    return f"{record['what']} ({where})" if "what" in record else f"{where}, since {record['since']}"


@contextmanager
def _beating(path: Path, then: Callable[[], bool] = bool) -> Iterator[None]:
    """Gives a record a new time every `BEAT` seconds, until `then` says that it has ended."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(BEAT):
            with suppress(FileNotFoundError):
                os.utime(path)
            if then():
                return

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _stop_if_replaced(mine: Path, say: Say) -> bool:
    """Ends this process, which was taken for dead: its machine slept, or did not reach the folder.

    Snakemake then begins no more jobs. A shell has commands in the background ignore an interrupt.
    """
    newer = [path for path in _controllers(mine.parent) if _number(path) > _number(mine)]
    if newer:
        say(f"another snakemake has taken this folder, {_who(_read(newer[-1]))}; this one ends")
        os.kill(os.getpid(), signal.SIGTERM)
    return bool(newer)


def _end_with(process: Process) -> None:
    """Interrupts this process when another one of this machine has ended."""
    while process.runs() is not False:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGTERM)


def _slurm(*command: str) -> str | None:
    """What a command of Slurm's says; None where there is none, or it fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    return None if done.returncode else done.stdout


def _slurm_jobs() -> set[str] | None:
    """The user's jobs that wait, run or are about to end."""
    said = _slurm("squeue", "--noheader", "--user", str(os.getuid()), "--format", "%A")
    return None if said is None else set(said.split())


def _cancel_queued(controller: dict | None, say: Say) -> None:
    """Cancels the jobs of an ended run that have not begun: they would come too late."""
    command = ("squeue", "--noheader", "--user", str(os.getuid()), "--states", "PENDING", "--format", "%A %j")
    if not controller or not controller.get("queues"):
        return
    queued = [line.split()[0] for line in (_slurm(*command) or "").splitlines() if controller["run"] in line]
    if queued:
        say(f"cancelling queued jobs of the snakemake that ended, to submit them again: {' '.join(queued)}")
        _slurm("scancel", "--state=PENDING", *queued)
