"""Libraries that open tokenizers are not made for damaged files: what they raise then is turned into one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from trtbuild.errors import UserError


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Whatever is raised inside, also Rust's panics, is a `UserError` that begins with `what`; nothing is printed."""
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # where a panic writes its own report
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic is no `Exception`
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{what} ({reason}); fetch the files again") from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
