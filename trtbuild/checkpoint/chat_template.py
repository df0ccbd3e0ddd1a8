"""Chat templates for checkpoints that come without one.

They are Jinja templates as `transformers` renders them (https://huggingface.co/docs/transformers/chat_templating), and
lie in `trtbuild/chat_templates`.
"""

from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.files import atomic

SHIPPED = Path(__file__).parents[1] / "chat_templates"


def names() -> list[str]:
    """The shipped templates."""
    return sorted(path.stem for path in SHIPPED.glob("*.jinja"))


def apply(folder: Path, name: str) -> None:
    """Gives the tokenizer in `folder` the shipped template `name`, or the file at that path if it ends with `.jinja`.

    It is written as `chat_template.jinja`, which `transformers` prefers to a template in `tokenizer_config.json`. A
    link of that name is replaced, not written through. An unknown name and an unreadable file are a `UserError`.
    """
    if name.endswith(".jinja"):
        path = Path(name)
    elif name in names():
        path = SHIPPED / f"{name}.jinja"
    else:
        raise UserError(f"there is no chat template {name!r}; use {', '.join(names())} or the path of a .jinja file")
    try:
        template = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"the chat template {path} does not exist") from error
    except OSError as error:
        raise UserError(f"cannot read the chat template {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"the chat template {path} is not UTF-8 text: {error}") from error
    with atomic(Path(folder) / "chat_template.jinja") as temporary:
        temporary.write_text(template, encoding="utf-8")
