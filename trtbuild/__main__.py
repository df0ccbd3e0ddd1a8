"""`trtbuild`, and `python -m trtbuild`."""

import os
import signal


def main() -> None:
    """Runs the command line; Ctrl-C ends it with one word and with 130, also while it is being imported."""
    signal.signal(signal.SIGINT, _interrupted)
    from trtbuild.runtime.world import stay_by

    stay_by()
    from trtbuild.cli import main

    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()


def _interrupted(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
