"""Text in and out, whole and as a stream."""

import json
import os
import shutil

import pytest
from tokenizers import AddedToken, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.errors import UserError
from trtbuild.runtime.streaming import TextStream
from trtbuild.tokenizer.tokenizer import Tokenizer

TEXTS = [
    "plain",
    "naïve café",
    "模型量化引擎",
    "🚀🙂",
    "a🚀b模c",
    "👩‍👩‍👧 family",
    "e\u0301 combining",
    " . , 'm n't",
    "\u2028\n\t x",
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return Tokenizer(tiny_checkpoint)


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def change_json(path, **values):
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def stream(tokenizer, ids, stop_words=()):
    """The pieces after each token, and what `end` adds."""
    pieces = []
    text_stream = TextStream(tokenizer, stop_words, pieces.append)
    for token in ids:
        text_stream.put(token)
    held = len(pieces)
    text_stream.end()
    return pieces, held


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *ids, 1]) == text  # special tokens are not text


def test_no_text_is_no_tokens(tokenizer):
    assert tokenizer.encode("") == tokenizer.encode("", chat=False) == []


def test_what_a_model_has_beyond_the_tokenizer_is_no_text(tokenizer):
    """Nor the second names for special tokens, which are there."""
    assert tokenizer.decode([*tokenizer.encode("a"), *range(258, 320), *tokenizer.encode("b")]) == "ab"


def test_no_chat_template(tokenizer, tiny_checkpoint):
    with pytest.raises(UserError, match=f"the tokenizer in {tiny_checkpoint} has no chat template"):
        tokenizer.encode("hello", chat=True)


def test_chat_template(copy):
    change_json(copy / "tokenizer_config.json", chat_template=TEMPLATE)
    tokenizer = Tokenizer(copy)
    assert tokenizer.decode(tokenizer.encode("Wer da?", chat=True)) == "<user>Wer da?<a>"
    theirs = AutoTokenizer.from_pretrained(copy)
    message = [{"role": "user", "content": "Wer da?"}]
    expected = theirs.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert tokenizer.encode("Wer da?", chat=True) == expected


@pytest.fixture
def control(copy):
    """With a template that trims contents, and looks into them; its role's tokens are made of parts."""
    content = "{{ m.content | trim }}{% if '</s>' in m.content %}!{% endif %}"
    template = "{% for m in messages %}{{ '<' + m.role[0] + '>' }}" + content + "{{ eos_token }}{% endfor %}"
    change_json(copy / "tokenizer_config.json", chat_template=template, additional_special_tokens=["<u>"])
    return Tokenizer(copy)


def test_special_tokens_in_a_text_are_text(control):
    bos, eos = control.special_token_ids(("<s>", "</s>"))
    text = "a</s> <s>b</s"
    assert control.encode(text) == [i for c in text for i in control.encode(c)]
    assert control.decode(control.encode(text)) == text
    a, b, space = (control.encode(c) for c in "ab ")
    meant = [*a, eos, *space, bos, *b, *control.encode("</s")]
    assert control.encode(text, special_tokens=True) == meant
    # A text of somebody else's in one's own.
    assert control.encode(control.literal("</s>") + "</s>", special_tokens=True) == [*control.encode("</s>"), eos]


@pytest.mark.parametrize(
    "contents",
    [
        ["a</s>"],
        [" </s> a <u>\n"],
        ["<u>"],
        ["</s></s></s>"],
        ["</", "s>"],
        ["x</s", ">"],
        ["a<", "/s> b"],
        ["<<</s>>>", "<s>"],
        ["\ufdd0", "\ue000</s>"],
    ],
    ids=repr,
)
def test_only_the_template_writes_special_tokens(control, contents):
    """Contents are trimmed, tested and encoded as what they are."""
    user, end = control.special_token_ids(("<u>", "</s>"))
    expected = []
    for content in contents:
        expected += [user, *control.encode(content.strip() + ("!" if "</s>" in content else "")), end]
    messages = [{"role": "user", "content": content} for content in contents]
    assert control.encode_chat(messages) == expected
    if len(contents) == 1:
        assert control.encode(contents[0], chat=True) == expected
    joined = Tokenizer(control.folder, "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert joined.encode_chat(messages) == control.encode("".join(contents))


def test_an_end_of_generation_is_a_special_token(copy):
    """Also where tokenizer.json does not call it one, as fine-tuned models' files have it."""
    backend = FastTokenizer.from_file(str(copy / "tokenizer.json"))
    backend.add_tokens(["<end>", "<odd>"])
    backend.save(str(copy / "tokenizer.json"))
    end, odd = map(backend.token_to_id, ("<end>", "<odd>"))
    change_json(copy / "generation_config.json", eos_token_id=[end])
    tokenizer = Tokenizer(copy)
    assert end not in tokenizer.encode("a<end><odd>")
    assert tokenizer.encode("<end><odd>", special_tokens=True) == [end, odd]
    assert tokenizer.encode("<odd>") == [odd]  # text, its publisher says


def test_text_around_special_tokens_is_encoded_as_published(copy):
    """A dummy prefix that only the beginning of a prompt has, and a token that eats the space behind it."""
    backend = FastTokenizer.from_file(str(copy / "tokenizer.json"))
    pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words = {word: i for i, word in enumerate(["<s>", "</s>", "?", "▁", "▁a", "a", "▁b", "b", "<e>"])}
    backend = FastTokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizer
    backend.add_special_tokens(["<s>", "</s>", AddedToken("<e>", rstrip=True)])
    backend.save(str(copy / "tokenizer.json"))
    tokenizer = Tokenizer(copy)
    for text in ("a b", "<s>a b", "a<s>b", "<s> a", "a<e> b", "<e>  </s>b", "a</s> b"):
        assert tokenizer.encode(text, special_tokens=True) == backend.encode(text).ids, text
    assert tokenizer.encode("a<s>b") == [words["?"]]


def test_a_cut_separates(tmp_path):
    """What is around it is encoded apart; else a template's text and a content are one text."""
    backend = FastTokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    backend.save(str(tmp_path / "tokenizer.json"))
    messages = [{"role": "user", "content": "b"}]
    assert Tokenizer(tmp_path, "a{{ messages[0].content }}").encode_chat(messages) == [2]
    assert Tokenizer(tmp_path, "a{{ cut ~ messages[0].content }}").encode_chat(messages) == [0, 1]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no') }}", "no"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
    ],
)
def test_a_template_that_fails(tiny_checkpoint, template, reason):
    with pytest.raises(UserError, match=f"^the chat template fails: {reason}"):
        Tokenizer(tiny_checkpoint, template).encode("text", chat=True)


@pytest.mark.parametrize("missing", ["file", "folder"])
def test_no_tokenizer(copy, missing):
    (copy / "tokenizer.json").unlink() if missing == "file" else shutil.rmtree(copy)
    with pytest.raises(UserError, match=f"{copy} has no tokenizer.json"):
        Tokenizer(copy)


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [(1, None, (1,)), (7, None, (1, 7)), ([7, 8], 9, (1, 7, 8, 9)), (None, [1, 5], (1, 5))],
)
def test_ends_of_sequence_come_from_every_file(copy, config, generation, expected):
    change_json(copy / "config.json", eos_token_id=config)
    if generation is not None:
        change_json(copy / "generation_config.json", eos_token_id=generation)
    assert Tokenizer(copy).eos_token_ids == expected


@pytest.mark.parametrize(
    ("stop_words", "expected"),
    [(("c",), "ab"), (("cd", "b"), "a"), (("x",), "abcabc"), ((), "abcabc"), (("a",), "")],
    ids=str,
)
def test_text_ends_before_the_first_stop_word(tokenizer, stop_words, expected):
    assert tokenizer.text(tokenizer.encode("abcabc"), stop_words) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_whole_characters(tokenizer, text):
    """One byte a token: a character appears when its last byte is there, not before and not later."""
    pieces, held = stream(tokenizer, tokenizer.encode(text))
    assert pieces == list(text)
    assert held == len(pieces)


def test_stream_of_an_unfinished_character(tokenizer):
    """What can never be completed is shown at the end as `decode` shows it."""
    ids = tokenizer.encode("ok 🚀")[:-1]
    pieces, held = stream(tokenizer, ids)
    assert pieces[:held] == ["o", "k", " "]
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "\ufffd" in pieces[-1]


@pytest.mark.parametrize(
    ("text", "stop_words", "expected"),
    [
        ("one STOP two", ("STOP",), "one "),
        ("one STO", ("STOP",), "one STO"),
        ("one STO STOP", ("STOP",), "one STO "),
        ("a🚀b模型c", ("模型",), "a🚀b"),
        ("a🚀b", ("🚀",), "a"),
        ("STOP", ("STOP",), ""),
        ("xy longer stop", ("stop", "longer"), "xy "),
        ("nothing of it", ("STOP", "END"), "nothing of it"),
    ],
)
def test_stream_never_prints_a_stop_word(tokenizer, text, stop_words, expected):
    pieces, _ = stream(tokenizer, tokenizer.encode(text), stop_words)
    assert "".join(pieces) == expected


def test_stream_holds_back_no_more_than_a_stop_word(tokenizer):
    pieces, held = stream(tokenizer, tokenizer.encode("abcdefgh"), ("xyz",))
    assert "".join(pieces[:held]) == "abcdef"  # two more could begin the three letters


def test_special_tokens_among_stop_words(tiny_checkpoint):
    """`decode` leaves special tokens out, so as stop words they are ids."""
    tokenizer = Tokenizer(tiny_checkpoint)
    assert tokenizer.special_token_ids(("</s>", "x")) == tokenizer.eos_token_ids


# Damaged folders


@pytest.fixture
def copied(tiny_checkpoint, tmp_path):
    """The tokenizer's files alone."""
    for file in tiny_checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path / file.name)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "cannot be opened"),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}', "cannot be opened"),
        ("tokenizer_config.json", "[1]", r"tokenizer_config\.json holds a JSON list"),
        ("tokenizer_config.json", '{"bos_token": 7}', "cannot be opened"),
        ("tokenizer_config.json", b"\xff", r"tokenizer_config\.json is not UTF-8"),
        ("special_tokens_map.json", "{", r"special_tokens_map\.json is not valid JSON"),
        ("special_tokens_map.json", '{"eos_token": [1]}', "cannot be opened"),
        ("added_tokens.json", "[" * 100_000, r"added_tokens\.json is not valid JSON: it is nested too deeply"),
        ("generation_config.json", '{"eos_token_id": "x"}', "eos_token_id is 'x'; token ids are expected"),
        ("generation_config.json", '{"eos_token_id": [[2]]}', "token ids are expected"),
        ("chat_template.jinja", b"\xff", r"chat_template\.jinja is not UTF-8"),
    ],
)
def test_damaged_files(copied, name, content, message):
    (copied / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer(copied)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_what_never_ends_is_not_opened(copied, name):
    (copied / name).unlink(missing_ok=True)
    os.mkfifo(copied / name)
    with pytest.raises(UserError, match=f"{name} is a pipe; a file is expected"):
        Tokenizer(copied)


def test_replacements_that_multiply(copied):
    """Forty of them would make a terabyte of one letter."""
    content = json.loads((copied / "tokenizer.json").read_text())
    twice = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    content["normalizer"] = {"type": "Sequence", "normalizers": [twice] * 40}
    (copied / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"may make a text {2**40} times as long; at most 256 is expected"):
        Tokenizer(copied)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", '{"version": "1.0"}', "the tokenizer in .* cannot be opened"),
        ("chat_template.jinja", "{% for %}", r"chat_template\.jinja is no Jinja template: Expected an expression"),
    ],
)
def test_a_checkpoint_with_a_broken_tokenizer_is_not_made(tiny_checkpoint, tmp_path, name, content, message):
    source = shutil.copytree(tiny_checkpoint, tmp_path / "source")
    (source / name).write_text(content)
    with pytest.raises(UserError, match=message):
        make_checkpoint({"local": {"path": str(source)}}, tmp_path / "checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_special_token_as_long_as_a_book(copied):
    """Its beginnings are looked for in every text, which are as many as it has characters."""
    (copied / "special_tokens_map.json").write_text(json.dumps({"eos_token": "x" * 100_000}))
    with pytest.raises(UserError, match="a special token has 100000 characters; at most 1024"):
        Tokenizer(copied)


def test_a_tokenizer_of_another_model(copied):
    """A token beyond the vocabulary would be read from other memory, or end in a traceback."""
    tokenizer = Tokenizer(copied)
    largest = max(tokenizer.encode("text"))
    (copied / "config.json").write_text(json.dumps({"vocab_size": largest + 1}))
    assert Tokenizer(copied).encode("text") == tokenizer.encode("text")
    (copied / "config.json").write_text(json.dumps({"vocab_size": largest}))
    with pytest.raises(
        UserError, match=f"has the token {largest}, the model's vocabulary {largest}; they are not of one"
    ):
        Tokenizer(copied).encode("text")
