"""Outputs that stay until they are made anew, whatever becomes of the rule that makes them; jobs that record theirs.

Snakemake removes a rule's outputs before it runs, and what there is after it failed. The rules here write beside an
output and rename (`files.atomic`). So until a rule has replaced its output, the old one is whole, and what Snakemake
has on record about it (parameters, inputs) is right: a rule that ended before that is as if it had not been started.
Whether it has is told by time: Snakemake marks an output as incomplete when it starts a job.

On a cluster Snakemake has its controller record what a job has made. It may be gone by then, so the job does it, too.

Snakemake has no setting for either: its `update` flag copies the outputs, and puts the failed job on record. So five of
its methods are wrapped, none of which is documented. Should one go, no run begins.
"""

import os
from collections.abc import Collection
from typing import Any


def keep_outputs(rules: Collection[str]) -> None:
    """Has Snakemake keep the outputs of `rules` until they are replaced, and jobs record theirs, in this process."""
    from snakemake.jobs import Job
    from snakemake.persistence import PersistenceBase

    remove, postprocess = Job.remove_existing_output, Job.postprocess
    incomplete, started, finished = PersistenceBase.incomplete, PersistenceBase.started, PersistenceBase.finished

    def replaced(persistence: Any, output: Any) -> bool:
        """Whether an output is newer than the mark that Snakemake set when it started the job."""
        return os.lstat(output).st_mtime >= persistence._get_recorded_starttime(persistence._get_key(output))

    async def incomplete_outputs(persistence: Any, job: Any) -> list:
        """What a job that did not come to its end may have made; Snakemake's records are of what was there before."""
        marked = await incomplete(persistence, job)
        return [output for output in marked if job.rule.name not in rules or replaced(persistence, output)]

    def start(persistence: Any, job: Any, external_jobid: str | None = None) -> None:
        """A new mark must not make an output that was replaced and not recorded look older than the job."""
        outputs = {persistence._get_key(output): output for output in job.output if os.path.lexists(output)}
        persistence.deactivate_cache()
        marked = persistence._filter_incomplete_keys(outputs) if job.rule.name in rules else ()
        unrecorded = [outputs[key] for key in marked if replaced(persistence, outputs[key])]
        started(persistence, job, external_jobid)
        for output in unrecorded:
            os.utime(output)

    async def finish(persistence: Any, job: Any) -> None:
        """Snakemake lets a job record what it has made where no controller waits for it: `--immediate-submit`."""
        workflow = persistence.dag.workflow
        settings = workflow.remote_execution_settings
        before, settings.immediate_submit = settings.immediate_submit, settings.immediate_submit or workflow.remote_exec
        try:
            await finished(persistence, job)
        finally:
            settings.immediate_submit = before

    async def kept(job: Any) -> bool:
        return job.rule.name in rules and not await job.dag.workflow.persistence.incomplete(job)

    async def remove_existing_output(job: Any) -> None:
        if not await kept(job):
            await remove(job)
        for log in job.log:
            await log.remove()

    async def after_job(job: Any, *arguments: Any, error: bool = False, **options: Any) -> None:
        if not error or not await kept(job):
            await postprocess(job, *arguments, error=error, **options)

    Job.remove_existing_output, Job.postprocess = remove_existing_output, after_job
    PersistenceBase.incomplete, PersistenceBase.started, PersistenceBase.finished = incomplete_outputs, start, finish
