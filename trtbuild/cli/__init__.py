"""`trtbuild`: the workflow's work, one command a stage, without Snakemake."""

import os
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Annotated

import typer

from trtbuild import __version__
from trtbuild.cli.doctor import doctor
from trtbuild.cli.engines import build, inspect, verify
from trtbuild.cli.evaluate import benchmark, gate, lm_eval, perplexity, score, summarize
from trtbuild.cli.names import Commands, with_hyphens
from trtbuild.cli.plan import plan
from trtbuild.cli.run import run
from trtbuild.cli.weights import calibrate, convert, quantize
from trtbuild.errors import one_line
from trtbuild.runtime.world import launched

COMMANDS = (
    *(
        convert,
        calibrate,
        quantize,
        build,
        run,
        summarize,
        score,
        perplexity,
        lm_eval,
        gate,
        benchmark,
        verify,
        inspect,
    ),
    *(plan, doctor),
)

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"token_normalize_func": with_hyphens},
)
for command in COMMANDS:
    app.command()(command)


def _version(asked: bool) -> None:
    if asked:
        print(f"trtbuild {__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _led() -> AbstractContextManager:
    """`together.led`, which needs torch, where a launcher started several processes; else nothing."""
    if launched() == 1:
        return nullcontext()
    from trtbuild.runtime.together import led

    return led()


def main() -> None:
    """Entry point: what lies outside the program is one line on standard error and exit code 2."""
    try:
        try:
            with _led():
                app()
        except SystemExit as end:
            if end.code == 130:
                print("interrupted", file=sys.stderr)
            raise
        finally:
            sys.stdout.flush()  # or a full disk would be found out when the interpreter ends, too late to say so
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        with suppress(OSError):
            print(f"error: {line}", file=sys.stderr, flush=True)
        if isinstance(error, OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left for a stream that is full or gone
        sys.exit(2)
