"""Opening an engine folder: which engine, on which device, by how many processes."""

from dataclasses import dataclass
from pathlib import Path

import torch

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits, rank_file, read_config
from trtbuild.engine.portable import PortableEngine, read_portable
from trtbuild.errors import UserError
from trtbuild.files import sha256_of
from trtbuild.runtime.session import PortableSession, Session
from trtbuild.runtime.together import check_processes, obey, open_together
from trtbuild.runtime.world import world

RUNTIMES = ("auto", "portable", "tensorrt", "interpreted")


@dataclass(frozen=True)
class OpenedEngine:
    """A session and what it was opened from: the folder's `config.json` and the engine file that runs, a rank's."""

    session: Session
    config: dict
    file: str

    @property
    def sha256(self) -> str:
        """That of the engine file; of several ranks' files the sha256 of theirs."""
        suffix, outputs = Path(self.file).suffix, self.config["outputs"]
        hashes = {name: outputs[name]["sha256"] for name in outputs if name.endswith(suffix)}
        return hashes[self.file] if len(hashes) == 1 else sha256_of(hashes)

    @property
    def dtype(self) -> str:
        return self.config["recipe"]["dtype"]


def open_engine(folder: Path | str, runtime: str = "auto", device: str = "auto", check: bool = False) -> OpenedEngine:
    """Opens an engine folder after checking its files, with `check` down to the last byte (`read_config`).

    `auto` takes TensorRT where the folder has its engine and this GPU can run it, else the portable engine;
    `interpreted` runs the TensorRT network on the CPU. An engine of several ranks is portable; rank 0's session leads
    the others, and on those this does not return, but does what that is asked until rank 0 ends, and exits. Raises
    `UserError` for a folder, runtime or device that cannot be, and unless there is a process for each rank.
    """
    if (here := world()) and here.rank:
        obey(here)
    folder = Path(folder)
    config = read_config(folder, check)
    mapping, limits = Mapping(**config["mapping"]), BuildLimits(**config["limits"])
    check_processes(folder, mapping)
    portable, tensorrt = rank_file(0, "portable"), rank_file(0, "tensorrt")
    if runtime not in RUNTIMES:
        raise UserError(f"unknown runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")
    if mapping.world_size > 1 and runtime not in ("auto", "portable"):
        raise UserError(f"runtime {runtime} runs one rank, {folder} has {mapping.world_size}; use --runtime portable")
    if runtime == "auto":
        from trtbuild.engine.tensorrt_api import runs_here

        usable = tensorrt in config["outputs"] and device != "cpu" and mapping.world_size == 1
        runtime = "tensorrt" if usable and runs_here(config["builders"]["tensorrt"]) else "portable"
    file = tensorrt if runtime == "tensorrt" else portable
    for needed in {file, portable}:  # the portable file also holds the network that a TensorRT engine was lowered from
        if needed not in config["outputs"]:
            raise UserError(
                f"{folder} has no {needed}; build it with '--engine {'tensorrt' if needed == tensorrt else 'portable'}'"
            )
    packed = config["remove_input_padding"]
    session: Session
    if mapping.world_size > 1:
        session = open_together(folder, pick_device(device))
    elif runtime == "portable":
        session = PortableSession(PortableEngine.load(folder / portable, pick_device(device), show=True))
    else:
        from trtbuild.runtime.lowered_session import InterpretedSession, TensorRTSession

        network, _ = read_portable(folder / portable)
        if runtime == "interpreted":
            session = InterpretedSession(network, limits, packed)
        elif not torch.cuda.is_available():
            raise UserError("runtime tensorrt needs a GPU and there is none; use --runtime portable or interpreted")
        else:
            session = TensorRTSession(folder / tensorrt, network, limits, packed)
    return OpenedEngine(session, config, file)


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises `UserError` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda"):
        raise UserError(f"unknown device {device!r}; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for but torch finds no GPU; use --device cpu")
    return torch.device(device)
