"""Outputs that stay until they are made anew, whatever becomes of the rule that makes them.

Snakemake removes a rule's outputs before it runs, and what there is after it failed. The rules here write beside an
output and rename (`files.atomic`). So until a rule has replaced its output, the old one is whole, and what Snakemake
has on record about it (parameters, inputs) is right: a rule that ended before that is as if it had not been started.

Snakemake has no setting for this: its `update` flag copies the outputs, and puts the failed job on record. So three of
its methods are wrapped, none of which is documented. Should one go, no run begins.
"""

import os
from collections.abc import Collection
from typing import Any


def keep_outputs(rules: Collection[str]) -> None:
    """Has Snakemake keep the outputs of `rules` until they are replaced, in this process."""
    from snakemake.jobs import Job
    from snakemake.persistence import PersistenceBase

    remove, postprocess, incomplete = Job.remove_existing_output, Job.postprocess, PersistenceBase.incomplete

    def replaced(persistence: Any, output: Any) -> bool:
        """Whether an output is newer than the mark that Snakemake set when it started the job."""
        return os.lstat(output).st_mtime >= persistence._get_recorded_starttime(persistence._get_key(output))

    async def incomplete_outputs(persistence: Any, job: Any) -> list:
        """What a job that did not come to its end may have made; Snakemake's records are of what was there before."""
        marked = await incomplete(persistence, job)
        return [output for output in marked if job.rule.name not in rules or replaced(persistence, output)]

    async def kept(job: Any) -> bool:
        return job.rule.name in rules and not await job.dag.workflow.persistence.incomplete(job)

    async def remove_existing_output(job: Any) -> None:
        # Elsewhere, as on a cluster, a job begins when Snakemake has set the mark already.
        if not job.dag.workflow.is_main_process or not await kept(job):
            await remove(job)
        for log in job.log:
            await log.remove()

    async def after_job(job: Any, *arguments: Any, error: bool = False, **options: Any) -> None:
        if not error or not await kept(job):
            await postprocess(job, *arguments, error=error, **options)

    Job.remove_existing_output, Job.postprocess = remove_existing_output, after_job
    PersistenceBase.incomplete = incomplete_outputs
