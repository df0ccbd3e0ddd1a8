"""Snakemake that asks Slurm for its jobs' states every second; the executor waits ten seconds longer each time."""

import sys

from snakemake.cli import main
from snakemake_interface_executor_plugins.executors.remote import RemoteExecutor

RemoteExecutor.next_seconds_between_status_checks = property(lambda executor: 1, lambda executor, seconds: None)
main(sys.argv[1:])
