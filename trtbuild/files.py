"""Files that are either complete or not there at all, files from outside, and checksums."""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.limits import TEXT_BYTES
from trtbuild.processes import start_of

MARKER = "made-by-trtbuild"
LFS = b"version https://git-lfs.github.com/spec/"
HASHED = 1 << 20  # of larger files `state_of` takes size and time
SLOW = 1 << 30  # bytes; hashing them takes a second and more
ABANDONED = 24 * 3600  # seconds; processes of other hosts cannot be seen
KINDS = {
    stat.S_IFDIR: "folder",
    stat.S_IFREG: "file",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary sibling of `path` (a file or a folder, the caller makes either) and renames it at the end.

    On any exception the temporary is removed and `path` is left as it was, and a `UserError` names `path` where it
    named the temporary; what a killed process left is removed by the next one that makes `path`. Folders made here
    carry the file `MARKER`, and only such folders are replaced. A full disk, a place that cannot be written to and a
    folder with anybody else's files are a `UserError`.
    """
    path = Path(path).absolute()
    check_output(path)
    temporary = _temporary_sibling(path)
    try:
        yield temporary
        if path.exists() and path.is_dir() != temporary.is_dir():
            there, new = ("folder", "file") if path.is_dir() else ("file", "folder")
            raise UserError(f"{path} is a {there} and would be replaced by a {new}; choose another output")
        if temporary.is_dir():
            (temporary / MARKER).touch()
        if path.is_dir():
            _replace_folder(path, temporary)
        else:
            temporary.replace(path)
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(path))) from error
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or str(error).endswith(("(os error 28)", "(os error 122)")):  # how libraries written in Rust say it
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"disk full while writing {path}: {free / 2**20:.0f} MiB are left there; "
                "free some space or choose another output folder. Nothing was written."
            ) from error
        if isinstance(error, OSError) and (
            error.errno == errno.EFBIG or str(error.filename or "").startswith(str(temporary))
        ):
            raise UserError(f"cannot write {path}: {error.strerror}. Nothing was written.") from error
        raise
    finally:
        _remove(temporary)


def check_output(path: Path | str) -> None:
    """Raises `UserError` where an output cannot be written; best before the work is done.

    An output is a new name, a regular file, or a folder that is empty or was made here, or a link to one of these; what
    is not (a device, a pipe, anybody else's files) is never replaced.
    """
    try:
        path = Path(path)
        if (kind := kind_of(path)) not in (None, "file", "folder"):
            raise UserError(f"{path} is a {kind}; an output is a file or a folder, choose another")
        if kind == "folder" and not path.is_symlink() and any(path.iterdir()) and not (path / MARKER).exists():
            raise UserError(
                f"{path} holds files that trtbuild did not make; they would be lost. Choose another output."
            )
        there = next(folder for folder in path.absolute().parents if kind_of(folder))
        if not there.is_dir():
            raise UserError(f"cannot write {path}: {there} is no folder")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"cannot write {path}: the folder {there} is not writable")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def output_path(path: Path) -> Path:
    """Where an output goes that a user names: what a link leads to, not the link, is replaced. See `check_output`."""
    check_output(path)
    return path.resolve()


@contextmanager
def scratch_beside(path: Path | str) -> Iterator[Path]:
    """Yields an empty folder beside `path`, on the same file system, for what only making `path` needs.

    It is removed at the end, and what a killed process left by the next one that makes `path`. Raises `UserError` where
    `path` could not be written; any other one names `path` where it named the folder.
    """
    path = Path(path).absolute()
    check_output(path)
    temporary = _temporary_sibling(path, "scratch.")
    try:
        temporary.mkdir()
        yield temporary
    except UserError as error:
        raise UserError(str(error).replace(str(temporary), str(path))) from error
    finally:
        _remove(temporary)


def _replace_folder(path: Path, new: Path) -> None:
    """A rename replaces no folder that holds something; so the old one, whole, makes way first."""
    old = path.replace(_temporary_sibling(path, "old."))
    try:
        new.replace(path)
    except OSError:
        old.replace(path)
        raise
    _remove(old)


def _temporary_sibling(path: Path, kind: str = "") -> Path:
    """A name beside `path` that nothing has. Makes its folder, and removes what killed processes left there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    pid = os.getpid()
    host = socket.gethostname()
    temporary = path.with_name(f".{path.name}.{host}.{kind}{pid}-{start_of(pid)}.tmp")
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if other == temporary or _is_abandoned(other, host):
            _remove(other)
    return temporary


def _is_abandoned(temporary: Path, host: str) -> bool:
    """Whether nobody makes this any more: its process is gone, or, of another host, nothing was written for long."""
    name = re.fullmatch(rf"\..*\.{re.escape(host)}\.(?:[a-z]+\.)?(\d+)-(\d+)\.tmp", temporary.name)
    if name:
        return start_of(int(name[1])) != int(name[2])
    with suppress(OSError):  # it has just been renamed or removed
        return time.time() - max(path.lstat().st_mtime for path in (temporary, *temporary.rglob("*"))) > ABANDONED
    return False


def refuse_output_over_input(output: Path, source: Path) -> None:
    """Raises `UserError` if writing the folder `output` would replace `source`, or a folder that `source` lies in."""
    output, source = (Path(os.path.realpath(path)) for path in (output, source))  # which takes loops of links
    if output == source or output in source.parents:
        raise UserError(f"the output {output} would replace its own input {source}; choose another output")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path | str, value: object) -> None:
    """Writes `value` as indented JSON, atomically. NaN and infinity, which JSON does not have, are a `ValueError`."""
    with atomic(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


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


def kind_of(path: Path | str) -> str | None:
    """What a path leads to (`KINDS`), or None where nothing is. Raises `OSError`."""
    try:
        return KINDS.get(stat.S_IFMT(Path(path).stat().st_mode), "special file")
    except FileNotFoundError:
        return None


def check_input(path: Path | str) -> None:
    """Raises `UserError` unless there is a regular file (reading a pipe may never end), and its content."""
    try:
        kind = kind_of(path)
        if kind is None:
            raise UserError(f"{path} does not exist")
        if kind != "file":
            raise UserError(f"{path} is a {kind}; a file is expected")
        refuse_lfs_pointer(Path(path))
    except (OSError, ValueError) as error:  # a zero byte in the name
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_bytes(path: Path | str, limit: int = TEXT_BYTES) -> bytes:
    """Content of a file from outside; raises `UserError` where `check_input` does, and for more than `limit` bytes."""
    check_input(path)
    try:
        if (size := Path(path).stat().st_size) > limit:
            raise UserError(f"{path} has {size >> 20} MiB; at most {limit >> 20} are expected of such a file")
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def read_text(path: Path | str) -> str:
    """`read_bytes` as UTF-8; other bytes are a `UserError`, too."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def parse_json(text: str, where: Path | str) -> object:
    """A JSON value from outside; `UserError` for what is none, and for what Python would take for one: NaN, infinite
    numbers and half surrogates.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise UserError(f"{where} is not valid JSON: it is nested too deeply") from error
    except ValueError as error:  # among them too many digits and UnicodeEncodeError
        raise UserError(f"{where} is not valid JSON: {error}") from error
    return value


def sha256_of(value: object) -> str:
    """Hex digest of what JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number")


def read_json(path: Path | str, shape: dict | None = None) -> dict:
    """Reads a JSON object; a missing, malformed or other file is a `UserError` that names it.

    `shape` is of files that this project writes: the keys that it must have, each with its type, or with a shape.
    """
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; an object is expected")
    check_shape(value, shape or {}, path)
    return value


def check_shape(value: dict, shape: dict, where: Path | str) -> None:
    """Raises `UserError` for a key that is missing, or of another type; where a float is expected an int will do."""
    for key, kind in shape.items():
        if key not in value:
            raise UserError(f"{where}: the key {key} is missing; make the file again")
        expected = dict if isinstance(kind, dict) else kind
        if type(value[key]) not in ((int, float) if expected is float else (expected,)):
            found = type(value[key]).__name__
            raise UserError(f"{where}: {key} is a {found}, a {expected.__name__} is expected; make the file again")
        if isinstance(kind, dict):
            check_shape(value[key], kind, f"{where}: {key}")


def sha256(path: Path | str) -> str:
    """Hex digest of a file's content; with a bar for what takes longer."""
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        if size < SLOW:
            return hashlib.file_digest(file, "sha256").hexdigest()
        from trtbuild.progress import byte_bar

        digest = hashlib.sha256()
        with byte_bar(size, f"sha256 of {Path(path).name}") as bar:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                bar.update(len(chunk))
        return digest.hexdigest()


def state_of(files: Iterable[Path]) -> str:
    """A short digest that another one follows when a file comes, goes or changes.

    Of files up to `HASHED` bytes the content counts, of larger ones (weights) their size and time.
    """
    states = []
    for file in sorted(set(files)):
        with suppress(OSError):
            status = file.stat()
            if stat.S_ISREG(status.st_mode):
                content = sha256(file) if status.st_size <= HASHED else [status.st_size, status.st_mtime_ns]
                states.append([str(file), content])
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
