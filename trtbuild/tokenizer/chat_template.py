"""Chat templates for models whose tokenizer comes without one.

They are Jinja templates as `transformers` renders them (https://huggingface.co/docs/transformers/chat_templating), and
lie in `trtbuild/chat_templates`.
"""

from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.files import atomic, read_json, read_text, user_path
from trtbuild.tokenizer.template_worker import TemplateWorker

SHIPPED = Path(__file__).parents[1] / "chat_templates"


def names() -> list[str]:
    """The shipped templates."""
    return sorted(path.stem for path in SHIPPED.glob("*.jinja"))


def read(name: str) -> str:
    """The shipped template `name`, or the file at that path if it ends with `.jinja`.

    An unknown name, an unreadable file and one that is no Jinja template are a `UserError`.
    """
    if name in names():
        return (SHIPPED / f"{name}.jinja").read_text(encoding="utf-8")
    if not name.endswith(".jinja"):
        raise UserError(f"there is no chat template {name!r}; use {', '.join(names())} or the path of a .jinja file")
    template = read_text(path := user_path(name))
    check(template, f"the chat template {path}")
    return template


def check(template: str, where: str) -> None:
    """Raises `UserError` for what is no Jinja template."""
    try:
        TemplateWorker().compile(template)
    except UserError as error:
        raise UserError(f"{where} is no Jinja template: {error}") from error


def write(folder: Path, template: str) -> None:
    """Gives the tokenizer in `folder` its published template, as `chat_template.jinja`.

    `transformers` prefers that to one in `tokenizer_config.json`. A link of that name is replaced, not written through.
    """
    with atomic(folder / "chat_template.jinja") as temporary:
        temporary.write_text(template, encoding="utf-8")


def is_in(folder: Path) -> bool:
    """Whether the tokenizer in `folder` brings a template along."""
    config = folder / "tokenizer_config.json"
    own = read_json(config).get("chat_template") if config.exists() else None
    return bool(own) or (folder / "chat_template.jinja").exists()
