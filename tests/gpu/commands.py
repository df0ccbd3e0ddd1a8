"""`trtbuild`'s commands with two ranks under MPI, on two GPUs (or CPUs) of one host, beside one rank.

    python tests/gpu/commands.py                (--device cpu: where there is no GPU)

A small model with random weights in float32. `run` gives one rank's tokens: with tensor parallelism, with two stages,
and where each rank sees its own GPU alone; so does `summarize`; `perplexity` gives its number; `benchmark` ends; and a
rank that is killed in the middle ends all. Prints a table, and exits with 1 where something is not so.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
LAYOUTS = {"one": (), "tp2": ("--tp-size", 2), "pp2": ("--pp-size", 2)}
LIMITS = ("--max-batch-size", 4, "--max-input-len", 512, "--max-output-len", 512)
SECONDS = 10  # in which all have ended after a rank was killed
LOCAL_RANK = "${OMPI_COMM_WORLD_LOCAL_RANK:-${MPI_LOCALRANKID:-$PMI_RANK}}"  # as launchers say it
OWN_GPU = f"CUDA_VISIBLE_DEVICES={LOCAL_RANK}"


class Commands:
    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        self.environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}

    def command(self, layout: str, *arguments: object, shell: str = "") -> list[str]:
        words = [sys.executable, "-m", "trtbuild", *map(str, arguments)]
        if shell:
            words = ["bash", "-c", f'{shell} exec "$@"', "bash", *words]
        return words if layout == "one" else [*mpiexec(), "-n", "2", *words]

    def __call__(self, layout: str, *arguments: object, shell: str = "") -> str:
        """What it prints."""
        command = self.command(layout, *arguments, shell=shell)
        done = subprocess.run(command, capture_output=True, text=True, env=self.environment, timeout=180)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def start(self, layout: str, name: str, *arguments: object, shell: str = "") -> str:
        """A command that runs an engine."""
        return self(
            layout, name, "--engine-dir", self.folder / layout, "--device", self.device, *arguments, shell=shell
        )

    def tokens(self, layout: str, shell: str = "") -> list:
        text = (word for prompt in ("What is a star?", "a", "one two " * 60) for word in ("--input-text", prompt))
        options = "--tokenizer-dir", self.folder / "checkpoint", "--max-output-len", 64, "--json"
        lines = self.start(layout, "run", *text, *options, shell=shell).splitlines()
        return [json.loads(line)["output_ids"] for line in lines]

    def summaries(self, layout: str) -> list:
        path = self.folder / f"{layout}.jsonl"
        options = "--samples", 6, "--max-output-len", 32, "--output", path
        self.start(layout, "summarize", "--checkpoint-dir", self.folder / "checkpoint", *options)
        return [json.loads(line)["output_ids"] for line in path.read_text().splitlines()]

    def perplexity(self, layout: str) -> float:
        options = "--checkpoint-dir", self.folder / "checkpoint", "--samples", 6
        return round(json.loads(self.start(layout, "perplexity", *options))["perplexity"], 1)

    def benchmark(self, layout: str) -> bool:
        return json.loads(self.start(layout, "benchmark", "--json"))["time_per_output_token_s"] > 0

    def killed(self, layout: str) -> float:
        """Seconds until all have ended after rank 1 was killed in a long benchmark."""
        options = "--engine-dir", self.folder / layout, "--device", self.device, "--output-len", 400, "--repeats", 10000
        command = self.command(layout, "benchmark", *options, shell=f"echo rank {LOCAL_RANK} $$ >&2;")
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=self.environment) as process:
            assert process.stderr
            ranks: dict[str, int] = {}
            while len(ranks) < 2:  # a launcher may have something to say as well
                ranks |= {
                    rank: int(number) for rank, number in re.findall(r"rank (\d) (\d+)", process.stderr.readline())
                }
            time.sleep(20 if self.device == "cuda" else 8)
            os.kill(ranks["1"], signal.SIGKILL)
            start = time.perf_counter()
            process.wait(60)
            while any(map(alive, ranks.values())):
                time.sleep(0.02)
            seconds = time.perf_counter() - start
            print(f"{layout}, killed: exit code {process.returncode}, said {process.stderr.read()[-300:]!r}")
        return seconds


def mpiexec() -> list[str]:
    """Open MPI's does not serve root without being told."""
    own = Path(sys.executable).with_name("mpiexec")
    program = str(own) if own.exists() else shutil.which("mpiexec") or sys.exit("there is no mpiexec")
    version = subprocess.run([program, "--version"], capture_output=True, text=True).stdout
    return [program, *(["--allow-run-as-root", "--oversubscribe"] if re.search("Open ?(MPI|RTE)", version) else [])]


def alive(process: int) -> bool:
    with suppress(OSError):
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rpartition(")")[2]
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--side-by-side", type=int, default=3, metavar="N", help="commands at a time")
    args = parser.parse_args()
    wrong = 0
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.side_by_side) as pool:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(CONFIG))
        run = Commands(folder, args.device)
        run("one", "convert", "--dummy", folder / "config.json", "--output-dir", folder / "checkpoint", "--dtype",
            "float32")  # fmt: skip

        def build(layout: str) -> None:
            options = "--checkpoint-dir", folder / "checkpoint", "--engine-dir", folder / layout, "--dtype", "float32"
            run("one", "build", *options, *LAYOUTS[layout], *LIMITS)

        list(pool.map(build, LAYOUTS))
        own_gpu = OWN_GPU if args.device == "cuda" else ""
        one = {name: pool.submit(getattr(run, name), "one") for name in ("tokens", "summaries", "perplexity")}
        jobs = {
            (what, layout): pool.submit(getattr(run, what), layout)
            for what in (*one, "benchmark")
            for layout in LAYOUTS
            if layout != "one"
        }
        jobs["tokens", "tp2, a GPU shown to each rank"] = pool.submit(run.tokens, "tp2", own_gpu)
        jobs["tokens", "pp2, a GPU shown to each rank"] = pool.submit(run.tokens, "pp2", own_gpu)
        killed = {layout: pool.submit(run.killed, layout) for layout in ("tp2", "pp2")}
        for (what, layout), job in jobs.items():
            expected = one[what].result() if what in one else True
            problem = ""
            try:
                result = job.result()
                problem = "" if result == expected else f"{result} for {expected}"
            except Exception as error:
                problem = str(error)
            wrong += bool(problem)
            print(f"{what:12} {layout:30} {problem or 'as one rank' if what in one else problem or 'ends'}", flush=True)
        for layout, ended in killed.items():
            seconds = ended.result()
            wrong += seconds > SECONDS
            print(f"rank 1 of {layout} killed: all ended after {seconds:.1f} s", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
