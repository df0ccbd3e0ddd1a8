"""What a user is meant to read instead of a traceback."""


class UserError(Exception):
    """A mistake outside the program: one line that says what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with 2; a workflow rule ends its log with it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # half surrogates cannot be printed


def one_line(error: BaseException) -> str | None:
    """What to say of an error that lies outside the program; None where it lies within.

    Outside are mistakes (`UserError`), what the operating system refuses, memory, and packages that are not installed.
    """
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed; 'pip install trtbuild[workflow]' brings it"
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "CUDA out of memory" in text:
        return f"out of memory ({text[:200] or 'of this machine'}); use a smaller model or batch, or a larger machine"
    if isinstance(error, OSError):  # also how huggingface_hub and transformers say that a file is not there
        return f"{error.filename}: {error.strerror}" if error.filename and error.strerror else text[:300]
    return None
