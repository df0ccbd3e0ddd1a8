"""The shipped chat templates: the text that they give, and its tokens with the tokenizers that they are for."""

import json

import pytest
from test_fast_tokenizer import MODELS, convert, convert_tiktoken, train_sentencepiece, train_tiktoken

from trtbuild.errors import UserError
from trtbuild.models.families import baichuan
from trtbuild.tokenizer.chat_template import is_in, names, read
from trtbuild.tokenizer.tokenizer import Tokenizer

QUESTION = "世界上第二高的山峰是哪座？"
ANSWER = "乔戈里峰。"
NEXT = "How high is it?"
SYSTEM = "Answer in one sentence."
ONE = [("user", QUESTION)]
MORE = [("user", QUESTION), ("assistant", ANSWER), ("user", NEXT)]
WITH_SYSTEM = [("system", SYSTEM), *MORE]
INST = f"[INST] <<SYS>>\n{SYSTEM}\n<</SYS>>\n\n{QUESTION} [/INST]"
USER = ["<|im_start|>", "user", "\n", QUESTION, "<|im_end|>", "\n"]
REST = ["<|im_start|>", "assistant", "\n", ANSWER, "<|im_end|>", "\n", "<|im_start|>", "user", "\n", NEXT, "<|im_end|>"]
PROMPT = ["<|im_start|>", "assistant", "\n"]


def system(text):
    return ["<|im_start|>", "system", "\n", text, "<|im_end|>", "\n"]


# Template, messages and the parts of the prompt, each of which the model's own code encodes by itself.
PROMPTS = [
    ("llama2", ONE, ["<s>", f"[INST] {QUESTION} [/INST]"]),
    ("llama2", MORE, ["<s>", f"[INST] {QUESTION} [/INST] {ANSWER} ", "</s>", "<s>", f"[INST] {NEXT} [/INST]"]),
    ("llama2", WITH_SYSTEM, ["<s>", f"{INST} {ANSWER} ", "</s>", "<s>", f"[INST] {NEXT} [/INST]"]),
    ("llama2", [("user", f" {QUESTION}\n")], ["<s>", f"[INST] {QUESTION} [/INST]"]),
    ("llama2", [("system", SYSTEM), ("user", f"{QUESTION} \n")], ["<s>", INST]),
    ("chatml", ONE, [*USER, *PROMPT]),
    ("chatml", MORE, [*USER, *REST, "\n", *PROMPT]),
    ("chatml", WITH_SYSTEM, [*system(SYSTEM), *USER, *REST, "\n", *PROMPT]),
    ("qwen", ONE, [*system("You are a helpful assistant."), *USER, *PROMPT]),
    ("qwen", MORE, [*system("You are a helpful assistant."), *USER, *REST, "\n", *PROMPT]),
    ("qwen", WITH_SYSTEM, [*system(SYSTEM), *USER, *REST, "\n", *PROMPT]),
    ("baichuan", ONE, ["<reserved_102>", QUESTION, "<reserved_103>"]),
    (
        "baichuan",
        MORE,
        ["<reserved_102>", QUESTION, "<reserved_103>", ANSWER, "</s>", "<reserved_102>", NEXT, "<reserved_103>"],
    ),
    ("baichuan2", ONE, ["<reserved_106>", QUESTION, "<reserved_107>"]),
    ("baichuan2", MORE[:2], ["<reserved_106>", QUESTION, "<reserved_107>", ANSWER]),
    (
        "baichuan2",
        WITH_SYSTEM,
        [SYSTEM, "<reserved_106>", QUESTION, "<reserved_107>", ANSWER, "<reserved_106>", NEXT, "<reserved_107>"],
    ),
    ("plain", ONE, [QUESTION]),
    ("plain", MORE, [QUESTION + ANSWER + NEXT]),
    ("plain-bos", ONE, ["<s>", QUESTION]),
    ("plain-bos", WITH_SYSTEM, ["<s>", SYSTEM + QUESTION + ANSWER + NEXT]),
]
REFUSED = [
    ("llama2", ["assistant"]),
    ("llama2", ["user", "user"]),
    ("llama2", ["user", "system"]),
    ("chatml", ["tool"]),
    ("qwen", ["user", "system"]),
    ("qwen", ["tool"]),
    ("baichuan", ["system", "user"]),
    ("baichuan2", ["user", "system"]),
    ("baichuan2", ["tool"]),
]


def messages(pairs):
    return [{"role": role, "content": content} for role, content in pairs]


def render(tokenizer, pairs, **options):
    """The text, by `transformers` itself, to which `cut` is unknown."""
    return tokenizer._tokenizer.apply_chat_template(
        messages(pairs), chat_template=tokenizer.chat_template, tokenize=False, **options
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """For each template a function that encodes a text as the model's own code does, and the converted tokenizer."""
    made = {}
    for name in names():
        folder = tmp_path_factory.mktemp(name)
        if name == "qwen":
            made[name] = convert_tiktoken(train_tiktoken(), folder)
            continue
        options = MODELS["no prefix" if name in ("chatml", "baichuan2") else "prefix"]
        if name == "chatml":
            options = {**options, "user_defined_symbols": ["\n"], "control_symbols": ["<|im_start|>", "<|im_end|>"]}
        model = train_sentencepiece(**options)
        processor, tokenizer = convert(model, folder, add_bos=True)
        if name.startswith("baichuan"):
            version = "v2_13b" if name == "baichuan2" else "v1_13b"
            baichuan.save_tokenizer(folder / "tokenizer.model", tokenizer.folder, {"trtbuild": {"version": version}})
        made[name] = processor.encode, tokenizer
    return {name: (encode, Tokenizer(tokenizer.folder, read(name))) for name, (encode, tokenizer) in made.items()}


@pytest.mark.parametrize(("name", "pairs", "parts"), PROMPTS)
def test_prompt(tokenizers, name, pairs, parts):
    encode, tokenizer = tokenizers[name]
    assert render(tokenizer, pairs, add_generation_prompt=True) == "".join(parts)
    ids = tokenizer.encode_chat(messages(pairs))
    special = tokenizer._tokenizer.get_added_vocab()
    assert ids == [i for part in parts for i in ([special[part]] if part in special else encode(part))]
    if len(pairs) == 1:
        assert tokenizer.encode(pairs[0][1], chat=True) == ids
    if [role for role, _ in pairs] == ["system", "user"]:
        assert tokenizer.encode(pairs[1][1], chat=True, system=pairs[0][1]) == ids


def test_every_template_is_tested():
    assert {name for name, *_ in PROMPTS} == set(names())


@pytest.mark.parametrize(("name", "pairs", "parts"), PROMPTS)
def test_without_the_prompt_of_an_answer(tokenizers, name, pairs, parts):
    prompt = {"chatml": "".join(PROMPT), "qwen": "".join(PROMPT), "baichuan": "<reserved_103>"}.get(name, "")
    if name == "baichuan2" and pairs[-1][0] == "user":
        prompt = "<reserved_107>"
    assert render(tokenizers[name][1], pairs, add_generation_prompt=False) + prompt == "".join(parts)


@pytest.mark.parametrize(("name", "roles"), REFUSED)
def test_roles_that_cannot_be(tokenizers, name, roles):
    with pytest.raises(UserError, match=r"^the chat template fails: roles must be "):
        tokenizers[name][1].encode_chat(messages((role, "text") for role in roles))


def test_plain_bos_needs_such_a_token(tmp_path):
    _, tokenizer = convert(train_sentencepiece(bos_id=-1), tmp_path)
    with pytest.raises(UserError, match="no token for the beginning of a sequence; use plain"):
        Tokenizer(tokenizer.folder, read("plain-bos")).encode("text", chat=True)


def test_a_template_that_is_given_goes_before_the_own_one(tmp_path):
    """Whether that is in the configuration or in a file."""
    _, tokenizer = convert(train_sentencepiece(), tmp_path)
    folder = tokenizer.folder
    assert not is_in(folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "theirs"}))
    assert is_in(folder)
    assert Tokenizer(folder).chat_template == "theirs"
    assert Tokenizer(folder, read("plain")).encode(QUESTION, chat=True) == tokenizer.encode(QUESTION)
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}theirs")
    assert Tokenizer(folder).encode(QUESTION, chat=True) == tokenizer.encode(QUESTION + "theirs")
    assert Tokenizer(folder, read("plain")).encode(QUESTION, chat=True) == tokenizer.encode(QUESTION)


def test_own_template(tmp_path):
    """As `transformers` reads it, whose templates may mark what the model is trained to write."""
    own = tmp_path / "own.jinja"
    text = "问：{% generation %}{{ messages[0]['content'] }}{% endgeneration %}"
    own.write_text(text, encoding="utf-8")
    assert read(str(own)) == text


def test_templates_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="there is no chat template 'qwen3'; use baichuan, baichuan2, chatml, llama2, "):
        read("qwen3")
    with pytest.raises(UserError, match=rf"{tmp_path}/own\.jinja does not exist"):
        read(f"{tmp_path}/own.jinja")
    (tmp_path / "folder.jinja").mkdir()
    with pytest.raises(UserError, match=rf"{tmp_path}/folder\.jinja is a folder; a file is expected"):
        read(f"{tmp_path}/folder.jinja")
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=rf"{tmp_path}/latin\.jinja is not UTF-8 text"):
        read(f"{tmp_path}/latin.jinja")
    for wrong, reason in (("{% for %}", "Expected an expression"), ("{{ x | nope }}", "No filter named 'nope'")):
        (tmp_path / "wrong.jinja").write_text(wrong)
        with pytest.raises(UserError, match=rf"{tmp_path}/wrong\.jinja is no Jinja template: {reason}.*\(line 1\)"):
            read(f"{tmp_path}/wrong.jinja")
