"""Names of options: `--engine_dir` is `--engine-dir`, and names of before go on working."""

import sys
from typing import Any

from typer.core import TyperGroup

# By command: what an option was called, and what it is called now.
OLD = {
    "build": {"--engine-dir": "--output-dir", "--model-config": "--dummy"},
    "summarize": {"--dtype": "--baseline-dtype"},
    "perplexity": {"--dtype": "--baseline-dtype"},
}


def with_hyphens(name: str) -> str:
    return name.replace("_", "-")


def renamed(command: str, arguments: list[str]) -> list[str]:
    """A command's arguments with the names of now; of every old one a line on standard error says the new one, once."""
    said: dict[str, str] = {}
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        new = OLD.get(command, {}).get(with_hyphens(name))
        if new:
            said[name] = new
        result.append(f"{new}{equals}{value}" if new else argument)
    if "--dummy" in said.values():  # `--model-config MODEL --dummy`, which had no value
        result = [new for new, old in zip(result, arguments, strict=True) if old != "--dummy"]
    for name, new in said.items():
        print(f"trtbuild {command}: {name} is now called {new}", file=sys.stderr)
    return result


class Commands(TyperGroup):
    """Commands that understand old names."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command, renamed(name or "", rest)
