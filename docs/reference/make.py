"""Writes configuration.md, from the schemas, and commands.md, from the command line: `make reference`."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from trtbuild.cli import app
from trtbuild.workflow import SCHEMAS
from trtbuild.yaml_reader import read_yaml

HERE = Path(__file__).parent
FILES = {
    "config": "What `snakemake` builds and measures. The last column is what the repository's own file says.",
    "models": "What models there are. A key of the file is a model's name.",
    "recipes": "How models are quantized. A key of the file is a recipe's name; those here add to the shipped ones "
    "([trtbuild/recipes.yaml](../../trtbuild/recipes.yaml)), or replace one.",
}
KINDS = {"object": "a mapping", "string": "text", "integer": "an integer", "number": "a number"}


def keys(schema: dict, path: str = "") -> Iterator[tuple[str, dict, bool]]:
    """Every key that a schema knows: its path, its own schema, and whether it must be there."""
    for name, part in schema.get("properties", {}).items():
        yield f"{path}{name}", part, name in schema.get("required", ())
        yield from keys(part, f"{path}{name}.")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from keys(schema["additionalProperties"], f"{path}NAME.")
    if "items" in schema:
        yield from keys(schema["items"], f"{path.removesuffix('.')}[].")


def code(value: object) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`".replace("\n", "\\n")


def values(schema: dict) -> str:
    """What a key may be, in words."""
    if "enum" in schema or "const" in schema:
        return ", ".join(map(code, schema.get("enum", [schema.get("const")])))
    if "oneOf" in schema:
        return " or ".join(map(values, schema["oneOf"]))
    if schema["type"] == "boolean":
        return "`true`, `false`"
    if schema["type"] == "array":
        return f"a list of {values(schema['items'])}"
    if "properties" in schema:
        return "keys, below"
    text = " or ".join(
        KINDS[kind] for kind in ([schema["type"]] if isinstance(schema["type"], str) else schema["type"])
    )
    if "exclusiveMinimum" in schema:
        return f"{text} above {schema['exclusiveMinimum']}"
    if "maximum" in schema:
        return f"{text}, {schema['minimum']} to {schema['maximum']}"
    return f"{text}, at least {schema['minimum']}" if "minimum" in schema else text


def shipped(path: str, config: Any) -> str:
    """What config/config.yaml says, of a value that fits into a line."""
    for name in path.split("."):
        config = config.get(name) if isinstance(config, dict) else None
    return "" if config is None or isinstance(config, dict) or len(str(config)) > 80 else code(config)


def configuration() -> str:
    config = read_yaml(HERE.parents[1] / "config" / "config.yaml")
    page = [
        "# Keys of the configuration",
        "What the three files in `config/` may say, made from the schemas that check them (`make reference`).",
    ]
    for file, text in FILES.items():
        schema = read_yaml(SCHEMAS / f"{file}.schema.yaml")
        rows = ["| key | values | meaning | default |", "| --- | --- | --- | --- |"]
        for path, part, required in keys(schema):
            default = code(part["default"]) if "default" in part else "required" if required else ""
            if file == "config":
                default = shipped(path, config)
            rows.append(f"| `{path}` | {values(part)} | {part['description']} | {default} |")
        page += [f"## config/{file}.yaml", text, "\n".join(rows)]
        if file == "recipes":
            contradictions = [f"- {clause['description']}" for clause in schema["additionalProperties"]["allOf"]]
            page += ["What contradicts itself is refused, in these words:", "\n".join(contradictions)]
    return "\n\n".join(page) + "\n"


def commands() -> str:
    group = typer.main.get_command(app)
    context = group.make_context("trtbuild", [], resilient_parsing=True)
    page = [
        "# Commands",
        "Every command of `trtbuild` with its options, made from what `--help` says (`make reference`). Options may be"
        " written with underscores, too; a name means the same in every command.",
        " · ".join(f"[{name}](#trtbuild-{name})" for name in group.commands),
    ]
    for name, command in group.commands.items():
        records = [parameter.get_help_record(context) for parameter in command.params]
        cells = [[part.replace("|", "\\|") for part in record] for record in records if record]
        rows = [f"| `{names}` | {text} |" for names, text in cells]
        page += [
            f"## trtbuild {name}",
            *(re.sub(r": (trtbuild [^;]*)", r": `\1`", " ".join(text.split())) for text in command.help.split("\n\n")),
            "\n".join(["| option | meaning |", "| --- | --- |", *rows]),
        ]
    return "\n\n".join(page) + "\n"


PAGES = {"configuration.md": configuration, "commands.md": commands}

if __name__ == "__main__":
    for name, content in PAGES.items():
        (HERE / name).write_text(content())
