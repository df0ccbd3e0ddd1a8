"""What Python imports first in every process of a test: it says where ranks run, and stops jobs in the middle.

`RANKS` is a folder that gets a file for each rank that a launcher started: its job, number, node and GPUs. `HANG` is a
file that lists outputs, a line each: a job that is about to rename one of them says so in `HANG.reached` and waits
while it is listed.
"""

import json
import os
import pathlib
import sys
import time

if "RANKS" in os.environ and "trtbuild.launch" in sys.orig_argv:
    names = ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID", "SLURMD_NODENAME", "CUDA_VISIBLE_DEVICES")
    rank = {name: os.environ[name] for name in names}
    pathlib.Path(os.environ["RANKS"], f"{os.getpid()}.json").write_text(json.dumps(rank))

if "HANG" in os.environ:
    outputs, rename = pathlib.Path(os.environ["HANG"]), pathlib.Path.replace

    def replace(self, target):
        path = str(pathlib.Path(target).absolute())
        if path in outputs.read_text().split():
            with open(f"{outputs}.reached", "a") as reached:
                print(path, file=reached)
        while path in outputs.read_text().split():
            time.sleep(0.1)
        return rename(self, target)

    pathlib.Path.replace = replace
