"""Files that are either complete or not there at all, and their checksums."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trtbuild.errors import UserError


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary sibling of `path` (a file or a folder, the caller makes either) and renames it at the end.

    On any exception the temporary is removed and `path` is left as it was. A full disk is reported as a `UserError`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove(temporary)
    try:
        yield temporary
        if path.is_dir() and not path.is_symlink():
            _remove(path)
        temporary.replace(path)
    except OSError as error:
        if error.errno in (28, 122):  # ENOSPC, EDQUOT
            free = shutil.disk_usage(path.parent).free
            raise UserError(
                f"disk full while writing {path}: {free / 2**20:.0f} MiB are left there; "
                "free some space or choose another output folder. Nothing was written."
            ) from error
        raise
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path | str, value: object) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> dict:
    """Reads a JSON file; a missing or malformed one is a `UserError` that names it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def sha256(path: Path | str) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
