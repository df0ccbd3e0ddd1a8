"""Chat templates come with checkpoints and are programs: they are rendered in a process of their own, within limits.

`transformers`' sandbox keeps a template from the machine, but not from writing ten gigabytes, or from never ending.
"""

import json
import resource
import subprocess
import sys
import threading
from contextlib import suppress

from trtbuild.errors import UserError
from trtbuild.limits import TEMPLATE_BYTES, TEMPLATE_CHARACTERS, TEMPLATE_SECONDS


class TemplateWorker:
    """Renders templates as `transformers` does; the process starts with the first one, and ends with this object."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        if self._process:
            self._process.kill()
            with suppress(BrokenPipeError), self._process:
                self._process = None

    def compile(self, template: str) -> None:
        """Raises `UserError` for what is no Jinja template, and where compiling it exceeds the limits."""
        self._ask({"template": template})

    def render(self, template: str, messages: list[dict[str, str]], **variables: object) -> str:
        """The conversation, ready for an answer. Raises `UserError` if the template fails or exceeds the limits."""
        return self._ask({"template": template, "messages": messages, "variables": variables})

    def _ask(self, request: dict) -> str:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],  # not from the folder that a user is in
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
            )
            assert self._process.stdout
            self._process.stdout.readline()  # it is ready
        process = self._process
        assert process.stdin
        assert process.stdout
        timer = threading.Timer(TEMPLATE_SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            self._end()
            raise UserError(f"it takes more than {TEMPLATE_SECONDS} seconds or {TEMPLATE_BYTES >> 20} MiB")
        answer = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        try:
            answer["text"].encode()
        except UnicodeEncodeError as error:
            raise UserError(f"it writes what is no text: {error}") from error
        return answer["text"]


def _answer(request: dict) -> dict:
    from transformers.utils.chat_template_utils import render_jinja_template

    conversations = [request["messages"]] if "messages" in request else []
    variables = {"chat_template": request["template"], "add_generation_prompt": True, **request.get("variables", {})}
    try:
        texts, _ = render_jinja_template(conversations, **variables)  # type: ignore[str-unpack]  # it returns a pair
    except MemoryError:
        return {"error": f"it takes more than {TEMPLATE_BYTES >> 20} MiB"}
    except Exception as error:  # Jinja's, and whatever a template's expressions raise
        line = f" (line {error.lineno})" if hasattr(error, "lineno") else ""
        return {"error": f"{' '.join(str(error).split())[:300] or type(error).__name__}{line}"}
    text = texts[0] if texts else ""
    if len(text) > TEMPLATE_CHARACTERS:
        return {"error": f"it writes more than {TEMPLATE_CHARACTERS} characters"}
    return {"text": text}


def _serve() -> None:
    import transformers.utils.chat_template_utils  # noqa: F401 (before there is a limit)

    with open("/proc/self/statm", encoding="ascii") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + TEMPLATE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(flush=True)
    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    _serve()
