"""Files that are either complete or not there at all, and their checksums."""

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trtbuild.errors import UserError

MARKER = "made-by-trtbuild"
LFS = b"version https://git-lfs.github.com/spec/"


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary sibling of `path` (a file or a folder, the caller makes either) and renames it at the end.

    On any exception the temporary is removed and `path` is left as it was, and a `UserError` names `path` where it
    named the temporary; what a killed process left is removed by the next one that makes `path`. Folders made here
    carry the file `MARKER`, and only such folders are replaced. A full disk, a place that cannot be written to and a
    folder with anybody else's files are a `UserError`.
    """
    path = Path(path).absolute()
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        if path.exists() and path.is_dir() != temporary.is_dir():
            there, new = ("folder", "file") if path.is_dir() else ("file", "folder")
            raise UserError(f"{path} is a {there} and would be replaced by a {new}; choose another output")
        if temporary.is_dir():
            (temporary / MARKER).touch()
        if path.is_dir():
            _remove(path)
        temporary.replace(path)
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(path))) from error
    except Exception as error:
        full = getattr(error, "errno", None) in (28, 122)  # ENOSPC, EDQUOT
        if full or str(error).endswith(("(os error 28)", "(os error 122)")):  # how libraries written in Rust say it
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"disk full while writing {path}: {free / 2**20:.0f} MiB are left there; "
                "free some space or choose another output folder. Nothing was written."
            ) from error
        raise
    finally:
        _remove(temporary)


@contextmanager
def scratch_beside(path: Path | str) -> Iterator[Path]:
    """Yields an empty folder beside `path`, on the same file system, for what only making `path` needs.

    It is removed at the end, and what a killed process left by the next one that makes `path`. Raises `UserError` where
    `path` could not be written.
    """
    temporary = _temporary_sibling(Path(path).absolute(), "scratch.")
    try:
        temporary.mkdir()
        yield temporary
    finally:
        _remove(temporary)


def _temporary_sibling(path: Path, kind: str = "") -> Path:
    """A name beside `path` that nothing has; raises `UserError` where `path` cannot be written or replaced."""
    if path.is_dir() and not path.is_symlink() and any(path.iterdir()) and not (path / MARKER).exists():
        raise UserError(f"{path} holds files that trtbuild did not make; they would be lost. Choose another output.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: its folder is not writable")
    prefix = f".{path.name}.{socket.gethostname()}."
    temporary = path.with_name(f"{prefix}{kind}{os.getpid()}.tmp")
    for other in path.parent.glob(f"{glob.escape(prefix)}*.tmp"):
        if other == temporary or not _is_running(other.suffixes[-2][1:]):
            _remove(other)
    return temporary


def refuse_output_over_input(output: Path, source: Path) -> None:
    """Raises `UserError` if writing the folder `output` would replace `source`, or a folder that `source` lies in."""
    output, source = output.resolve(), source.resolve()
    if output == source or output in source.parents:
        raise UserError(f"the output {output} would replace its own input {source}; choose another output")


def _is_running(pid: str) -> bool:
    """Whether a process of this host runs; process numbers of other hosts mean nothing here."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, ValueError):  # another user's process; a name that is not one of ours
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path | str, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def user_path(path: Path | str) -> Path:
    """A path as a configuration gives it, with `~` and environment variables (`$HOME`, `${HOME}`) put in."""
    return Path(os.path.expandvars(path)).expanduser()


def refuse_lfs_pointer(path: Path) -> None:
    """Raises `UserError` for the small text that Git LFS leaves in place of a file that was not fetched.

    Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
    """
    with open(path, "rb") as file:
        if file.read(len(LFS)) == LFS:
            raise UserError(f"{path} is a Git LFS pointer, not the file itself; run 'git lfs pull' in {path.parent}")


def read_json(path: Path | str) -> dict:
    """Reads a JSON object; a missing, malformed or other file is a `UserError` that names it."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        refuse_lfs_pointer(Path(path))
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; an object is expected")
    return value


def sha256(path: Path | str) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
