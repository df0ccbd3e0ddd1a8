"""Templates in a process of their own: what transformers renders, and what would not end or fill the memory."""

import time

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from trtbuild.errors import UserError
from trtbuild.tokenizer import chat_template, template_worker
from trtbuild.tokenizer.template_worker import TemplateWorker

MESSAGES = [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " 你好 <|im_end|> \x00\u2028 "}]


@pytest.fixture(scope="module")
def worker():
    return TemplateWorker()


@pytest.mark.parametrize("name", chat_template.names())
def test_renders_as_transformers(worker, name):
    template = chat_template.read(name)
    messages = MESSAGES if name in ("baichuan2", "chatml", "llama2", "qwen") else MESSAGES[1:]
    variables = {"bos_token": "<s>", "eos_token": "</s>", "cut": "|"}
    expected, _ = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **variables)
    assert worker.render(template, messages, **variables) == expected[0]


def test_modules_of_the_folder_are_not_imported(tmp_path, monkeypatch):
    """Where a user works may lie a file that is called as a package; nobody meant to run it."""
    (tmp_path / "jinja2.py").write_text("import os; os._exit(1)")
    monkeypatch.chdir(tmp_path)
    assert TemplateWorker().render("{{ messages[0].content }}", MESSAGES[:1]) == "Be brief.\n"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ 'a' * 10**10 }}", "1024 MiB"),
        (
            "{% set n = namespace(x='a') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
            "1024",
        ),
        ("{% for i in range(10) %}{{ 'a' * 2**21 }}{% endfor %}", "more than 16777216 characters"),
        ("{{ '%0999999999999d' % 1 }}", "1024 MiB|too big"),
        ("{{ raise_exception('no system text') }}", "no system text"),
        ("{{ messages[7].content.x.y }}", "has no element 7"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ '\ud800' }}", "what is no text"),
        ("{" * 20_000 + "%", "."),
        ("{% if 1 %}" * 5_000 + "{% endif %}" * 5_000, "."),
    ],
)
def test_what_goes_wrong_is_one_line(worker, template, reason):
    """Also where it would be computed while the template is compiled. The next one is served as if nothing were."""
    with pytest.raises(UserError, match=reason) as caught:
        worker.render(template, MESSAGES)
    assert "\n" not in str(caught.value)
    assert worker.render("{{ messages[1].role }}", MESSAGES) == "user"


def test_what_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(template_worker, "TEMPLATE_SECONDS", 1)
    loop = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    started = time.monotonic()
    worker = TemplateWorker()
    with pytest.raises(UserError, match="it takes more than 1 seconds"):
        worker.render(loop, MESSAGES)
    assert time.monotonic() - started < 60
    monkeypatch.undo()
    worker.compile(loop)  # which is quick, and by a new process


def test_the_process_ends_with_its_owner():
    worker = TemplateWorker()
    worker.compile("{{ 1 }}")
    process = worker._process
    del worker
    assert process.returncode is not None
