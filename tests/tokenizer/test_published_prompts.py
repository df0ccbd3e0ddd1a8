"""Chat prompts with published tokenizer files, against the published formats over the original libraries.

Each reference is what the model's own code does with a system text and turns of (question, answer); the last answer is
still to come. What stands for a special token in a text is text, which Baichuan's role tokens are not to SentencePiece.
"""

import base64
import random
import unicodedata

import pytest
import sentencepiece
import tiktoken
from test_published_tokenizers import strings

from trtbuild.models.families import baichuan, llama, qwen
from trtbuild.tokenizer.chat_template import read
from trtbuild.tokenizer.tokenizer import Tokenizer


def llama2_prompt(processor, system, turns):
    """`chat_completion` of https://github.com/meta-llama/llama: a turn is one text, trimmed, behind its own `<s>`."""
    ids = []
    for i, (question, answer) in enumerate(turns):
        if system and i == 0:
            question = f"<<SYS>>\n{system}\n<</SYS>>\n\n{question}"
        text = f"[INST] {question.strip()} [/INST]"
        ids += [1, *processor.encode(text if answer is None else f"{text} {answer.strip()} ")]
        ids += [] if answer is None else [2]
    return ids


def baichuan_prompt(user, assistant, ends):
    """`build_chat_input` of https://huggingface.co/baichuan-inc: roles are ids, and a content is encoded by itself."""

    def prompt(processor, system, turns):
        ids = processor.encode(system) if system else []
        for question, answer in turns:
            ids += [user, *processor.encode(question), assistant]
            ids += [] if answer is None else [*processor.encode(answer), *ends]
        return ids

    return prompt


def qwen_prompt(encoding, system, turns):
    """`make_context` of https://github.com/QwenLM/Qwen: role, line break and content are encoded each by itself."""
    encode = lambda text: encoding.encode_ordinary(unicodedata.normalize("NFC", text))
    start, end, newline = 151644, 151645, encode("\n")
    part = lambda role, content: [start, *encode(role), *newline, *encode(content)]
    ids = [*part("system", system or "You are a helpful assistant."), end]
    for question, answer in turns:
        ids += [*newline, *part("user", question), end, *newline, start, *encode("assistant"), *newline]
        ids += [] if answer is None else [*encode(answer), end]
    return ids


# File, template, family, its version, the prompt, whether it knows system texts, and tokens that are text here alone.
FORMATS = {
    "llama2": ("llama.model", llama, None, llama2_prompt, True, ()),
    "baichuan": ("baichuan-7b.model", baichuan, "v1_13b", baichuan_prompt(195, 196, [2]), False, baichuan.ROLES["v1"]),
    "baichuan2": ("baichuan2.model", baichuan, "v2_13b", baichuan_prompt(195, 196, []), True, baichuan.ROLES["v2"]),
    "qwen": ("qwen.tiktoken", qwen, None, qwen_prompt, True, ()),
}


def original(path):
    if path.suffix == ".model":
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}
    return tiktoken.Encoding("qwen", pat_str=qwen.PATTERN, mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("name", FORMATS)
def test_prompts(name, published_tokenizer, tmp_path):
    file, family, version, expected, knows_system, only_here = FORMATS[name]
    family.save_tokenizer(published_tokenizer(file), tmp_path, {"trtbuild": {"version": version}})
    tokenizer, theirs = Tokenizer(tmp_path, read(name)), original(published_tokenizer(file))
    rng = random.Random(0)
    texts = [text for text in strings() if not any(token in text for token in only_here)]
    assert len(texts) > 5000
    for text in texts:
        turns = [(text, None)]
        assert tokenizer.encode(text, chat=True) == expected(theirs, None, turns), repr(text)
        if rng.random() < 0.2:
            system = rng.choice(texts) if knows_system and rng.random() < 0.7 else None
            turns = [tuple(rng.sample(texts, 2)) for _ in range(rng.randrange(3))] + turns
            pairs = [(role, t) for turn in turns for role, t in zip(("user", "assistant"), turn, strict=True)]
            messages = [{"role": r, "content": t} for r, t in [("system", system or None), *pairs] if t is not None]
            assert tokenizer.encode_chat(messages) == expected(theirs, system, turns), repr(messages)


@pytest.mark.parametrize("name", FORMATS)
def test_no_text_holds_a_special_token(name, published_tokenizer, tmp_path):
    """A prompt has those of the template and no more, whatever a text is made of; its text comes back whole."""
    file, family, version, *_ = FORMATS[name]
    family.save_tokenizer(published_tokenizer(file), tmp_path, {"trtbuild": {"version": version}})
    tokenizer = Tokenizer(tmp_path, read(name))
    special = [token for token in tokenizer._alias if token.isascii()]
    ids = {*tokenizer.special_token_ids(tuple(special))}
    count = lambda text: sum(i in ids for i in tokenizer.encode(text, chat=True))
    rng = random.Random(0)
    for text in [*special, *("".join(rng.choices([*special, "x", " ", "<", "|>"], k=5)) for _ in range(100))]:
        assert count(text) == count("x"), text
        assert tokenizer.decode(tokenizer.encode(text)).strip() == text.strip()
