"""Text in and out, whole and as a stream."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from trtbuild.errors import UserError
from trtbuild.runtime.streaming import TextStream
from trtbuild.runtime.tokenizer import Tokenizer

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
