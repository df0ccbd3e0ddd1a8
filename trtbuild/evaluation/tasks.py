"""Accuracy tasks by lm-evaluation-harness, of an engine or of the Hugging Face model."""

import difflib
import logging
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trtbuild.engine.config import marker, read_config
from trtbuild.errors import UserError
from trtbuild.evaluation.baseline import open_baseline
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.evaluation.provenance import provenance
from trtbuild.files import sha256_of, user_path
from trtbuild.runtime.open import open_engine
from trtbuild.tokenizer.tokenizer import published_tokenizer

if TYPE_CHECKING:
    from lm_eval.api.model import LM

SEED = 1234  # of few-shot examples, the harness's own
KEPT = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")  # of what the harness returns


def measure_task(
    *,
    task: str,
    checkpoint_dir: Path,
    engine_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    include: str | None = None,
    max_input_len: int = 0,
    max_output_len: int = 0,
    baseline_dtype: str = "float32",
    runtime: str = "auto",
    device: str = "auto",
    check: bool = False,
    model: str | None = None,
) -> dict:
    """The harness's scores of a task, or a group of tasks, by an engine, or without `engine_dir` by the baseline.

    `limit`: so many documents of each task, from the first. `include`: a folder of task files beside the harness's own;
    what they name with `!function` is run. An engine brings its own lengths. Code of a data set or a metric from the
    hub is never run. Raises `UserError` where the harness is not installed, and for a task that it does not have or
    cannot load.
    """
    if find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed; 'pip install trtbuild[lm-eval]' brings it")
    if engine_dir:
        read_config(engine_dir)  # what is wrong there is said before the task's data are fetched
    with quiet(), no_code_from_the_hub() as refused:
        tasks = _load(task, include, num_fewshot)
        _check(task, refused)
        lm, origin = _opened(
            checkpoint_dir, engine_dir, (max_input_len, max_output_len), baseline_dtype, runtime, device, check, model
        )
        try:
            found = _evaluate(lm, tasks, limit)
        finally:
            _check(task, refused)  # what the harness makes of it would be another error, or none
    samples = found.pop("samples")
    hashes = {name: [[s["doc_hash"], s["prompt_hash"], s["target_hash"]] for s in samples[name]] for name in samples}
    origin |= {
        "task": task,
        "limit": limit,
        "num_fewshot": num_fewshot,
        "max_input_len": lm.max_length,
        "max_output_len": lm.max_gen_toks,
        "prompts_sha256": sha256_of(hashes),
        "seed": SEED,
    }
    origin["versions"] |= {"lm_eval": version("lm_eval")}
    result = {key: found[key] for key in KEPT if found.get(key)}
    return {"task": task} | _finite(result) | {"provenance": origin} | marker(origin["model"])


def task_table(result: dict) -> str:
    """Metrics and their standard errors, a line each."""
    lines = []
    for name, metrics in (result.get("groups", {}) | result["results"]).items():
        for metric, value in metrics.items():
            kind, _, filtered = metric.partition(",")
            if isinstance(value, float | int) and filtered and not kind.endswith("_stderr"):
                error = metrics.get(f"{kind}_stderr,{filtered}")
                shown = f" +- {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"{name:32} {kind if filtered == 'none' else metric:24} {value:.4f}{shown}")
    return "\n".join(lines)


def _opened(
    checkpoint_dir: Path,
    engine_dir: Path | None,
    lengths: tuple[int, int],
    baseline_dtype: str,
    runtime: str,
    device: str,
    check: bool,
    model: str | None,
) -> tuple["LM", dict]:
    """The harness's model, and where its scores come from."""
    from trtbuild.evaluation.harness_model import SessionLM, TransformersLM

    tokenizer = published_tokenizer(checkpoint_dir)
    if engine_dir:
        opened = open_engine(engine_dir, runtime, device, check)
        return SessionLM(opened.session, tokenizer), provenance(opened)
    baseline = open_baseline(checkpoint_dir, baseline_dtype, device, None, *lengths)
    origin = baseline.provenance(model or checkpoint_dir.resolve().name)
    if not isinstance(baseline, HuggingFaceModel):
        return SessionLM(baseline.session(), tokenizer), origin
    return TransformersLM(baseline.model, tokenizer, *lengths), origin


def _check(task: str, refused: list[str]) -> None:
    """Raises `UserError` where a task wanted code of the hub."""
    if refused:
        raise UserError(f"the task {task} needs {refused[0]}, code of the hub, which is not run")


def _load(task: str, include: str | None, num_fewshot: int | None) -> dict:
    """The task or group, with its data. Raises `UserError` for one that is not there, or whose data are not."""
    from lm_eval.tasks import TaskManager

    include = include and str(user_path(include))
    if include and not Path(include).is_dir():
        raise UserError(f"{include} is no folder; lm_eval.include is one of task files")
    manager = TaskManager(include_path=include, include_defaults=False) if include else None
    if manager is None or task not in manager.all_subtasks:
        manager = TaskManager(include_path=include)  # reads thousands of files
    if task not in manager.all_tasks:
        close = difflib.get_close_matches(task, manager.all_tasks)
        known = f"closest: {', '.join(close)}" if close else "'lm-eval ls tasks' lists them"
        raise UserError(f"unknown task {task!r}; {known}")
    try:
        loaded = manager.load([task])
    except Exception as error:
        first, *_ = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"lm-eval cannot load the task {task}: {first}") from error
    for one in loaded["tasks"].values():
        own = one.get_config("num_fewshot")
        if own != 0:  # a task that says 0 means it
            one.set_config(key="num_fewshot", value=(own or 0) if num_fewshot is None else num_fewshot)
        one.set_fewshot_seed(seed=SEED)
        if getattr(one, "UNSAFE_CODE", False):
            raise UserError(f"the task {task} runs code that the model writes, which is not done here")
    return loaded


def _evaluate(lm: "LM", tasks: dict, limit: int | None) -> dict:
    """As the harness's own `simple_evaluate`, which would load the tasks again, with its seeds."""
    from lm_eval import evaluate

    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return evaluate(lm, tasks, limit=limit)


@contextmanager
def no_code_from_the_hub() -> Iterator[list[str]]:
    """Inside, `evaluate.load`, which downloads and runs what it is asked for, raises `UserError`; which, is noted."""
    import evaluate

    refused: list[str] = []

    def refuse(path: str, *args: object, **options: object) -> None:
        refused.append(f"the metric {path!r}")
        raise UserError(f"the metric {path!r} is code of the hub, which is not run")

    load, evaluate.load = evaluate.load, refuse
    try:
        yield refused
    finally:
        evaluate.load = load


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, the harness says what is wrong, and not what it does."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _finite(value: Any) -> Any:
    """Without numbers that JSON has not, which stand for "none"."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
