"""Published tokenizer files, converted, against the libraries that they were made for, on thousands of strings."""

import base64
import random
import unicodedata

import pytest
import sentencepiece
import tiktoken
from test_fast_tokenizer import CODE, PARTS, corpus, random_texts

from trtbuild.models.families import baichuan, llama, qwen
from trtbuild.tokenizer.tokenizer import Tokenizer

SENTENCEPIECE = {
    "llama.model": (llama, None),
    "baichuan-7b.model": (baichuan, "v1_7b"),
    "baichuan2.model": (baichuan, "v2_13b"),
}
CHINESE = """凌晨四点，港口的灯还亮着。老周把缆绳绕在桩上，抬头看了看天，说：“今天的雾，要到中午才散。”
没有人回答他。船上的三个年轻人都低着头，各自盯着手机——信号只有一格，消息却一条接一条。

一、研究背景
近年来，大型语言模型（LLM）的参数量从1.3亿增长到700亿，推理成本随之上升。以FP16为例，一个13B模型仅权重就需要约26GB显存；
采用INT8量化后降至13GB，而INT4约为6.5GB。表3给出了在A100上测得的延迟：首个词元48.2毫秒，其后每个词元9.7毫秒。

二、实验方法
（1）随机抽取512篇新闻；（2）每篇截断为2048个词元；（3）比较量化前后的困惑度。结果如下：5.47→5.52，相差不足1%。
注意！温度设为０．７，top_p=0.9，重复惩罚１．０５。参数写在config.yaml里，不要改动“seed: 42”这一行。

【通知】各部门：因设备检修，2024年5月6日（星期一）8:30～17:00暂停供水，请提前做好准备。联系电话：010-8888 1234。
問：繁體中文與簡體中文的分詞結果一樣嗎？答：不一樣。「臺灣」與「台湾」、「軟體」與「软件」都不同。
春风又绿江南岸，明月何时照我还？王安石改了十几次，才定下一个“绿”字。《宋史》有传。
价格：￥128.00／件，满３件打８折；会员另减￥5。物流3~5天，偏远地区7天左右。好评如潮，回购率达87.6％！！！
他笑了笑：“哈哈哈哈哈，真的吗？我不信……”她说：『信不信由你。』于是——一切又回到了原点。
"""
JAPANESE_AND_KOREAN = "東京タワーは高さ333メートル。ﾊﾝｶｸ ｶﾀｶﾅ ﾊﾞﾋﾟﾌﾟ、がぎぐげご。한국어 문장도 하나 넣는다. ㅋㅋㅋ ㅠㅠ"
SPACES = [chr(c) for c in (9, 10, 11, 12, 13, 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200D), 0x2028, 0x2029, 0x202F)]
SPACES += ["\u205f", "\u3000", "\ufeff", "\r\n"]
SPECIAL = ["<s>", "</s>", "<unk>", "<0x0A>", "<reserved_102>", "<reserved_103>", "<reserved_106>", "<reserved_107>"]
SPECIAL += ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "[INST]", "<<SYS>>", "<h2>", "```", "。。。"]
EMOJI = ["😀", "🚀", "👨‍👩‍👧", "👍🏽", "🇨🇳", "❤️", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "™️", "☺"]
COMPOSED = """naïve café Ångström Tiếng Việt đường phố ấ ộ ữ ǘ ḗ ᾳ έ Й ё が パ 한국어 각 क़ בְּרֵאשִׁית مُحَمَّدٌ
ﬁ ① ½ ² Ⅷ ㎏ ａｂｃ Ω Å"""


def every_character(start: int, stop: int) -> list[str]:
    """In lines of 64, as they are and decomposed; without those that Unicode keeps for a program's own use."""
    characters = [chr(c) for c in range(start, stop) if not 0xD800 <= c < 0xE000 and not 0xFDD0 <= c < 0xFDF0]
    lines = [" ".join(characters[i : i + 64]) for i in range(0, len(characters), 64)]
    return [*lines, *(unicodedata.normalize("NFD", line) for line in lines)]


def strings() -> list[str]:
    rng = random.Random(0)
    documents = [*corpus()[:80], CHINESE, CODE, JAPANESE_AND_KOREAN]
    cut = lambda text: text[(start := rng.randrange(len(text))) : start + rng.randrange(1, 200)]
    texts = [*documents, *(cut(text) for text in documents for _ in range(10)), *(cut(CHINESE) for _ in range(600))]
    texts += [cut(CODE) for _ in range(300)]
    texts += [space * length for space in SPACES for length in range(1, 40)]
    texts += ["".join(rng.choices([*SPACES, "a", "的"], k=rng.randrange(2, 12))) for _ in range(500)]
    texts += [str(rng.randrange(10 ** rng.randrange(1, 20))) for _ in range(200)]
    texts += random_texts([*SPECIAL, "the ", "的", " ", "\n", "x"], 500, seed=1)
    texts += random_texts([*EMOJI, " ", "a", "的"], 300, seed=2)
    for form in ("NFC", "NFD"):
        words = [unicodedata.normalize(form, word) for word in COMPOSED.split()]
        texts += [*words, *random_texts([*words, " ", "，"], 150, seed=3)]
    texts += [*every_character(1, 0x3400), *every_character(0xF900, 0x10000), *every_character(0x1D400, 0x1FB00)]
    return list(dict.fromkeys([*texts, *random_texts(PARTS, 1500, seed=4)]))


@pytest.fixture(scope="module")
def texts():
    texts = strings()
    assert len(texts) > 5000
    return texts


def ids_of(tokenizer, texts, **options):
    return tokenizer._tokenizer(texts, add_special_tokens=False, **options)["input_ids"]


def text_of(tokenizer, ids):
    return tokenizer._tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(name, published_tokenizer, texts, tmp_path):
    """Special tokens in a text are text, as they are to SentencePiece but for those of Baichuan's roles."""
    family, version = SENTENCEPIECE[name]
    family.save_tokenizer(published_tokenizer(name), tmp_path, {"trtbuild": {"version": version}})
    tokenizer = Tokenizer(tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(published_tokenizer(name)))
    roles = set(baichuan.ROLES[version[:2]] if version else ())
    for text, ids in zip(texts, ids_of(tokenizer, texts, split_special_tokens=True), strict=True):
        if any(role in text for role in roles):
            assert roles.isdisjoint(processor.id_to_piece(ids)), repr(text)
        else:
            assert ids == processor.encode(text), repr(text)
        assert text_of(tokenizer, ids) == processor.decode(ids), repr(text)


def test_tiktoken(published_tokenizer, texts, tmp_path):
    qwen.save_tokenizer(published_tokenizer("qwen.tiktoken"), tmp_path, {})
    tokenizer = Tokenizer(tmp_path)
    lines = published_tokenizer("qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
    special = {token: len(ranks) + i for i, token in enumerate(qwen.SPECIAL_TOKENS)}
    original = tiktoken.Encoding("qwen", pat_str=qwen.PATTERN, mergeable_ranks=ranks, special_tokens=special)
    normal = [unicodedata.normalize("NFC", text) for text in texts]
    for text, ids in zip(normal, ids_of(tokenizer, texts, split_special_tokens=True), strict=True):
        assert ids == original.encode_ordinary(text), repr(text)
        assert text_of(tokenizer, ids) == text
    for text, ids in zip(normal, ids_of(tokenizer, texts), strict=True):
        assert ids == original.encode(text, allowed_special="all"), repr(text)
        assert text_of(tokenizer, ids) == text


@pytest.mark.parametrize("name", [*SENTENCEPIECE, "qwen.tiktoken"])
def test_words_that_must_not_come(name, published_tokenizer, tmp_path):
    """At the beginning of a text, of a line, and after a space, whatever follows."""
    family, version = SENTENCEPIECE.get(name, (qwen, None))
    family.save_tokenizer(published_tokenizer(name), tmp_path, {"trtbuild": {"version": version}})
    tokenizer = Tokenizer(tmp_path)
    for word in ("bad", "Schiff", "天气", "two words"):
        words = tokenizer.words_ids([word])
        for text in (f"{word} is", f"not {word}, no", f"so:\n{word}\n"):
            ids = tuple(tokenizer.encode(text))
            assert any(ids[i : i + len(one)] == one for one in words for i in range(len(ids))), text
        assert all(word in tokenizer.decode(list(ids)) for ids in words)
    special = "<|endoftext|>" if family is qwen else "</s>"
    assert tokenizer.words_ids([special]) == (tokenizer.special_token_ids((special,)),)


@pytest.mark.parametrize(("name", "other"), [("baichuan-7b.model", (106, 107)), ("baichuan2.model", (102, 103))])
def test_roles_of_baichuan(name, other, published_tokenizer, tmp_path):
    """Both generations say in `generation_config.json` that users are 195 and assistants 196."""
    _, version = SENTENCEPIECE[name]
    baichuan.save_tokenizer(published_tokenizer(name), tmp_path, {"trtbuild": {"version": version}})
    tokenizer = Tokenizer(tmp_path)
    roles = tuple(f"<reserved_{i}>" for i in (102, 103, 106, 107))
    assert tokenizer.special_token_ids(roles) == (195, 196)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(published_tokenizer(name)))
    for i in other:
        text = f"世界 <reserved_{i}>the river"
        assert ids_of(tokenizer, [text]) == [processor.encode(text)]
        assert tokenizer.decode(processor.encode(text)) == text
