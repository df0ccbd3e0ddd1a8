"""Converted tokenizers against the libraries whose files they come from."""

import base64
import io
import json
import random
import unicodedata
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import trtbuild
from trtbuild.errors import UserError
from trtbuild.tokenizer.fast_tokenizer import save_sentencepiece, save_tiktoken
from trtbuild.tokenizer.tokenizer import Tokenizer

CHINESE = """世界上第二高的山峰是哪座？世界上第二高的山峰是乔戈里峰，海拔8611米，位于中国与巴基斯坦的边境上。
大语言模型的推理需要很大的显存，量化可以把权重压缩到四位或者八位，同时尽量保持模型的精度。哈哈哈哈，真的吗？
请写一首关于春天的诗：春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。你好，我是一个人工智能助手，很高兴认识你！"""
CODE = """def fibonacci(n: int) -> int:
    # the n-th number
    if n < 2:
        return n
    return fibonacci(n - 1) + fibonacci(n - 2)

\tfor (int i = 0; i < 10; ++i) { printf("%d\\n", values[i]); }
<html><body class="x">== ==== ======== ---- ________</body></html>
"""
ROUND_TRIPS = [
    "世界上第二高的山峰是哪座？",
    "The capybara was 46 days on the run.",
    CODE,
    CHINESE,
    "👨‍👩‍👧 🚀🙂 🇨🇳 naïve café",
    "3.14159 = 2024-05-06 12:30",
]
PARTS = [
    *"abc eEs'.,=-_/<>|0129\t\n▁世界山峰的是哈？😀🚀é\u00a0\u3000\u200d\u0301\u0338\ufffd\x00",
    *(
        "  ",
        "    ",
        "\n\n",
        "\r\n",
        "the ",
        " and",
        "return",
        "def f(x):\n",
        "乔戈里峰",
        "👨‍👩‍👧",
        "e\u0301",
        "가",
        "\u1100\u1161",
    ),
    *("<reserved_106>", "<reserved_107>", "<reserved_10", "<0x0A>", "<0xE4>", "▁▁", "'s", "'LL", "8611", "==="),
    *"，？１ａ①½ﬁⅷÉ가ㅋㅏﾊﾞが\r\x01\x7f\u200b\u2028\ufeff\u0302\u0323\u0651\u064e\u0344ำຳ",
    *("a\u0323\u0302", "a\u0302\u0323", "ﾊﾞ", "か\u3099", "ㄱㅏ", "①\u0301", "\u00a0\u0301", "<h2>\u0338", "＜ｈ２＞"),
]
SYMBOLS = ["<reserved_102>", "<reserved_103>", "<reserved_106>", "<reserved_107>", "<reserved_10", "▁the", "é", "\n"]
MODELS = {
    "prefix": {"add_dummy_prefix": True, "remove_extra_whitespaces": False},
    "no prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "prefix, no symbols": {
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": [],
        "control_symbols": ["<|im_start|>", "<|im_end|>"],
    },
    "pieces of spaces": {
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "split_by_whitespace": False,
    },
    "prefix, shortened": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
    "no prefix, shortened": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "no bytes": {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "byte_fallback": False},
    "map": {  # as Baichuan's first
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "nmt_nfkc",
        "user_defined_symbols": [*SYMBOLS, "\t", "，", "？", "１", "<h2>"],
    },
    "map, no symbols, shortened": {
        "add_dummy_prefix": True,
        "remove_extra_whitespaces": True,
        "normalization_rule_name": "nmt_nfkc_cf",
        "user_defined_symbols": [],
    },
}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205))]
WHOLE = b" zqxj"  # a token that no merges make


def corpus():
    articles = (Path(trtbuild.__file__).parent / "articles").glob("*.jsonl")
    lines = [json.loads(line)["article"] for path in sorted(articles) for line in path.read_text().splitlines()]
    return lines + [*CHINESE.splitlines(), *CODE.splitlines()] * 20


def train_sentencepiece(**options):
    """A SentencePiece model as bytes; BPE with a fallback to bytes unless the options say otherwise."""
    out = io.BytesIO()
    defaults = {
        "model_type": "bpe",
        "vocab_size": 1200,
        "byte_fallback": True,
        "split_digits": True,
        "character_coverage": 0.999,
        "normalization_rule_name": "identity",
        "user_defined_symbols": SYMBOLS,
        "num_threads": 1,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=out, **{**defaults, **options}
    )
    return out.getvalue()


def convert(model, folder, **options):
    """SentencePiece's processor and the converted tokenizer."""
    folder.mkdir(exist_ok=True)
    path = folder / "tokenizer.model"
    path.write_bytes(model)
    save_sentencepiece(path, folder / "converted", **{"add_bos": False, **options})
    return sentencepiece.SentencePieceProcessor(model_proto=model), Tokenizer(folder / "converted")


def edited(model, pieces=(), **normalizer):
    """The model with more (piece, score) and changes to its normalizer's specification."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    for piece, score in pieces:
        proto.pieces.add(piece=piece, score=score)
    for name, value in normalizer.items():
        setattr(proto.normalizer_spec, name, value)
    return proto.SerializeToString()


def train_tiktoken():
    """Tokens of a byte-level BPE in tiktoken's form: bytes and rank."""
    trained = FastTokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    byte_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    tokens = sorted(trained.get_vocab(), key=trained.get_vocab().get)
    tokens = [bytes(byte_of[letter] for letter in token) for token in tokens]
    return {token: rank for rank, token in enumerate([*tokens, WHOLE])}


def write_tiktoken(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))


def convert_tiktoken(ranks, folder):
    """A function that gives tiktoken's ids as Qwen's own code takes them, and the converted tokenizer."""
    write_tiktoken(folder / "qwen.tiktoken", ranks)
    options = {"pattern": PATTERN, "special_tokens": QWEN_SPECIAL, "eos_token": "<|endoftext|>"}
    save_tiktoken(folder / "qwen.tiktoken", folder / "converted", **options)
    special = {token: len(ranks) + i for i, token in enumerate(QWEN_SPECIAL)}
    encoding = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)

    def encode(text, special_tokens=False):
        allowed = "all" if special_tokens else set()
        return encoding.encode(unicodedata.normalize("NFC", text), allowed_special=allowed, disallowed_special=())

    return encode, Tokenizer(folder / "converted")


def random_texts(parts, count, seed=0):
    rng = random.Random(seed)
    return ["".join(rng.choices(parts, k=rng.choice([1, 2, 3, 5, 8, 13, 30]))) for _ in range(count)]


@pytest.fixture(scope="module")
def llama_model():
    """Settings as in LLaMA's model."""
    return train_sentencepiece(**MODELS["prefix"])


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    return convert(train_sentencepiece(**MODELS[request.param]), tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="module")
def ranks():
    return train_tiktoken()


@pytest.fixture(scope="module")
def qwen(ranks, tmp_path_factory):
    return convert_tiktoken(ranks, tmp_path_factory.mktemp("tiktoken"))


# SentencePiece


def test_sentencepiece_random_texts(pair):
    processor, tokenizer = pair
    for text in random_texts(PARTS, 1500):
        assert tokenizer.encode(text) == processor.encode(text), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "   ",
        "▁",
        " ▁ ",
        "a",
        " a",
        "  a  b   ",
        "\t",
        "\n",
        "\n\n a\n",
        "a\r\nb",
        "1234567890",
        "<reserved_106>",
        " <reserved_106>",
        "<reserved_106> ",
        "<reserved_106><reserved_107>",
        "<reserved_106>the<reserved_107> the",
        "<reserved_1066<reserved_10",
        "x<reserved_106",
        "▁the",
        "the▁the▁▁the",
        "é",
        "caféé",
        "<0x0A>",
        "<reserved_106><0x0A><reserved_107><0x0A>",
        "\n<0xE4>\n",
        "😀",
        "👨‍👩‍👧" * 3,
        "\u3000世\u00a0",
        "a" * 500 + " " * 500 + "哈" * 500,
        *ROUND_TRIPS,
    ],
    ids=repr,
)
def test_sentencepiece_text(pair, text):
    processor, tokenizer = pair
    ids = tokenizer.encode(text)
    assert ids == processor.encode(text)
    if processor.unk_id() not in ids:
        assert tokenizer.decode(ids) == processor.decode(ids)


def test_no_text_is_no_tokens_but_those_added(llama_model, tmp_path):
    _, tokenizer = convert(llama_model, tmp_path, add_bos=True, add_eos=True)
    assert tokenizer._tokenizer("")["input_ids"] == [1, 2]


@pytest.mark.parametrize("name", ["prefix", "no prefix", "prefix, no symbols", "pieces of spaces"])
def test_sentencepiece_round_trips(name, tmp_path):
    _, tokenizer = convert(train_sentencepiece(**MODELS[name]), tmp_path)
    for text in [*ROUND_TRIPS, *random_texts([part for part in PARTS if "▁" not in part], 500)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text, repr(text)


@pytest.mark.parametrize("name", ["prefix", "no prefix", "no bytes"])
def test_decode_of_any_tokens(name, tmp_path):
    """An answer need not be what encoding its text gives: spaces in front, symbols and control tokens anywhere."""
    processor, tokenizer = convert(train_sentencepiece(**MODELS[name]), tmp_path)
    rng = random.Random(0)
    known = [i for i in range(len(processor)) if not processor.is_byte(i) and not processor.is_unknown(i)]
    space = processor.piece_to_id("▁")
    for _ in range(500):
        ids = rng.choices([1, 2, space], k=rng.randrange(4)) + rng.choices(known, k=5)
        assert tokenizer.decode(ids) == processor.decode(ids), processor.id_to_piece(ids)


def test_a_symbol_at_the_beginning_comes_after_the_dummy_prefix(llama_model, tmp_path):
    processor, tokenizer = convert(llama_model, tmp_path)
    ids = tokenizer.encode("<reserved_106>hello")
    assert ids[:2] == [processor.piece_to_id("▁"), processor.piece_to_id("<reserved_106>")]
    assert tokenizer.decode(ids) == "<reserved_106>hello"


def test_control_pieces_that_are_meant_and_the_rest_is_encoded_apart(llama_model, tmp_path):
    processor, tokenizer = convert(llama_model, tmp_path)
    text = "<s>one </s><unk> two<s>"
    assert tokenizer.encode(text) == processor.encode(text)
    ids = tokenizer.encode(text, special_tokens=True)
    assert ids == [1, *processor.encode("one "), 2, 0, *processor.encode(" two"), 1]
    assert tokenizer.decode(ids) == "one   two"
    assert tokenizer.special_token_ids(("<s>", "</s>", "<reserved_106>")) == (1, 2)


def test_symbols_named_as_special_tokens(llama_model, tmp_path):
    processor, tokenizer = convert(llama_model, tmp_path, special_tokens=["<reserved_106>", "<reserved_1>"])
    symbol, other = processor.piece_to_id(["<reserved_106>", "<reserved_107>"])
    text = "<reserved_106>one<reserved_107>two"
    assert symbol not in tokenizer.encode(text)  # which SentencePiece has no way to say
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode(text, special_tokens=True)
    assert ids == [symbol, *processor.encode("one<reserved_107>two")]
    assert other in ids
    assert tokenizer.decode(ids) == "one<reserved_107>two"
    assert tokenizer.special_token_ids(("<reserved_106>", "<reserved_107>")) == (symbol,)
    assert tokenizer._tokenizer.pad_token_id is None


def test_named_tokens(tmp_path):
    model = train_sentencepiece(unk_id=3, bos_id=2, eos_id=1, pad_id=0, bos_piece="<bos>", eos_piece="<eos>")
    _, tokenizer = convert(model, tmp_path)
    named = tokenizer._tokenizer
    assert [named.pad_token_id, named.eos_token_id, named.bos_token_id, named.unk_token_id] == [0, 1, 2, 3]
    assert tokenizer.special_token_ids(("<pad>", "<eos>", "<bos>", "<unk>")) == (0, 1, 2, 3)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
def test_beginning_and_end_of_a_sequence(llama_model, tmp_path, add_bos, add_eos):
    processor, tokenizer = convert(llama_model, tmp_path, add_bos=add_bos, add_eos=add_eos)
    text = "世界 and <reserved_106>"
    assert tokenizer.encode(text) == processor.encode(text, add_bos=add_bos, add_eos=add_eos)
    assert tokenizer.eos_token_ids == (processor.eos_id(),)


def test_bytes_that_are_no_characters(llama_model, tmp_path):
    """`tokenizers` shows every byte of such a run as U+FFFD, SentencePiece those that are no part of a character."""
    processor, tokenizer = convert(llama_model, tmp_path)
    ids = processor.piece_to_id([f"<0x{byte:02X}>" for byte in "🚀".encode()])
    letter = processor.piece_to_id("a")
    assert tokenizer.decode([letter, *ids, letter]) == processor.decode([letter, *ids, letter]) == "a🚀a"
    for part in (1, 2, 3):
        assert (
            tokenizer.decode([letter, *ids[:part]]) == processor.decode([letter, *ids[:part]]) == "a" + part * "\ufffd"
        )
    assert processor.decode([*ids, *ids[:1]]) == "🚀\ufffd"
    assert tokenizer.decode([*ids, *ids[:1]]) == 5 * "\ufffd"


def test_links_are_not_written_through(llama_model, ranks, tmp_path):
    theirs = tmp_path / "theirs.json"
    theirs.write_text("{}")
    (tmp_path / "converted").mkdir()
    for make in (lambda: convert(llama_model, tmp_path), lambda: convert_tiktoken(ranks, tmp_path)):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / "converted" / name).unlink(missing_ok=True)
            (tmp_path / "converted" / name).symlink_to(theirs)
        assert make()[1].encode("text")
        assert theirs.read_text() == "{}"


def test_pieces_that_their_own_text_does_not_give(llama_model, tmp_path):
    """Pieces put in by hand: no merges make the first two, and others compete for the letters of the last."""
    pieces = [("qqqq", -1e6), ("qqq", -2e6), ("theth", 1e6), ("thet", 2e6)]
    processor, tokenizer = convert(edited(llama_model, pieces, add_dummy_prefix=False), tmp_path)
    for piece, _ in pieces:
        for text in (piece, f"<reserved_106>{piece}<reserved_107>", f"{piece}\n{piece} {piece}", piece[:-1], piece * 2):
            assert tokenizer.encode(text) == processor.encode(text), text
    assert len(processor.encode("qqqq")) > 1


def test_vocabularies_of_chance(llama_model, tmp_path):
    """Pieces in an order that no training gives, of few letters, so that merges compete all the time."""
    rng = random.Random(1)
    empty = sentencepiece_model_pb2.ModelProto.FromString(edited(llama_model, add_dummy_prefix=False))
    kept = [piece for piece in empty.pieces if piece.type not in (piece.NORMAL, piece.USER_DEFINED)]
    del empty.pieces[:]
    empty.pieces.extend(kept)
    for trial in range(12):
        pieces = {"".join(rng.choices("ab", k=rng.randint(2, 6))) for _ in range(30)}
        pieces = [*rng.sample(sorted(pieces), len(pieces)), "a", "b"]
        model = edited(empty.SerializeToString(), [(piece, -i) for i, piece in enumerate(pieces)])
        processor, tokenizer = convert(model, tmp_path / str(trial))
        for text in random_texts("ab", 100, seed=trial):
            assert tokenizer.encode(text) == processor.encode(text), (pieces, text)


def test_pieces_of_the_same_score(llama_model, tmp_path):
    """As LLaMA's runs of spaces, which all have one score, and Baichuan2's pairs of pieces."""
    runs = [("▁" * length, -1e9) for length in range(2, 17)]
    pairs = [("ΑΒ", -1e6), ("ΓΔ", -1e6), ("ΑΒΓ", -2e6), ("ΔΑ", -2e6)]
    letters = [(letter, -1e7 - i) for i, letter in enumerate("ΑΒΓΔ")]
    processor, tokenizer = convert(edited(llama_model, [*runs, *pairs, *letters]), tmp_path)
    for text in [
        *(" " * length for length in range(100)),
        *random_texts(["Α", "Β", "Γ", "Δ", " ", " " * 7, "the"], 1000),
    ]:
        assert tokenizer.encode(text) == processor.encode(text), text


@pytest.mark.parametrize("part", [0, 0.01, 0.5, 0.99])
def test_sentencepiece_file_cut_short(llama_model, tmp_path, part):
    with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model, or not all of one"):
        convert(llama_model[: int(part * len(llama_model))], tmp_path)


def test_sentencepiece_file_without_its_last_part(llama_model, tmp_path):
    """A file may end between two parts, and is then a valid protocol buffer."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(llama_model)
    for name in ("normalizer_spec", "trainer_spec"):
        proto.ClearField(name)
        with pytest.raises(UserError, match="is not a SentencePiece model, or not all of one"):
            convert(proto.SerializeToString(), tmp_path)


def test_damaged_sentencepiece_models(llama_model, tmp_path):
    """What SentencePiece refuses, a piece that is not UTF-8, and a map that can be read in part."""
    for old, new in ((b"<0x0A>", b"<0x0Z>"), (b"<reserved_106>", b"<reserved_10\xff>"), (b"return", b"retur\xff")):
        assert old in llama_model
        with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model, or not all of one"):
            convert(llama_model.replace(old, new), tmp_path)
    charsmap = sentencepiece_model_pb2.ModelProto.FromString(train_sentencepiece(**MODELS["map"])).normalizer_spec
    damaged = edited(
        llama_model,
        name="nmt_nfkc",
        precompiled_charsmap=charsmap.precompiled_charsmap.replace("가".encode(), b"\xff\xff\xff"),
    )
    with pytest.raises(UserError, match=r"tokenizer\.model has a character map that is damaged"):
        convert(damaged, tmp_path)


def test_other_files_as_sentencepiece(tmp_path):
    for content in (b'{"version": "1.0"}', b"\xff" * 100):
        with pytest.raises(UserError, match=r"tokenizer\.model is not a SentencePiece model"):
            convert(content, tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.model is a Git LFS pointer"):
        convert(b"version https://git-lfs.github.com/spec/v1\n", tmp_path)
    with pytest.raises(UserError, match=r"absent\.model does not exist"):
        save_sentencepiece(tmp_path / "absent.model", tmp_path, add_bos=True)
    with pytest.raises(UserError, match=f"{tmp_path} is a folder; a file is expected"):
        save_sentencepiece(tmp_path, tmp_path, add_bos=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "is a SentencePiece model of the type unigram; only bpe is supported"),
        ({"normalization_rule_tsv": "map.tsv"}, "has the normalization 'user_defined'"),
        (
            {"normalization_rule_name": "nfkc", "user_defined_symbols": [chr(0xFF41 + i) + "x" for i in range(31)]},
            "its map changes 31 user-defined symbols; 30 can be spared",
        ),
        ({"treat_whitespace_as_suffix": True}, "has treat_whitespace_as_suffix"),
        ({"user_defined_symbols": ["a b"], "remove_extra_whitespaces": True}, "has user-defined symbols with spaces"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_sentencepiece_models(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("map.tsv").write_text("41\t42\n")
    with pytest.raises(UserError, match=message):
        convert(train_sentencepiece(**options), tmp_path)


def test_edited_sentencepiece_models(llama_model, tmp_path):
    with pytest.raises(UserError, match="has no escape_whitespaces"):
        convert(edited(llama_model, escape_whitespaces=False), tmp_path)
    with pytest.raises(UserError, match="has pieces with characters that are no pieces"):
        convert(edited(llama_model, [("aΩ", -1e6)]), tmp_path)
    proto = sentencepiece_model_pb2.ModelProto.FromString(llama_model)
    proto.pieces.add(piece="[PAD7]", type=proto.SentencePiece.UNUSED)  # no letters give it, so it is not there
    processor, tokenizer = convert(proto.SerializeToString(), tmp_path)
    assert tokenizer.encode("a [PAD7]") == processor.encode("a [PAD7]")
    next(piece for piece in proto.pieces if piece.piece == "th").type = proto.SentencePiece.UNUSED
    with pytest.raises(UserError, match="has unused pieces that are joined"):
        convert(proto.SerializeToString(), tmp_path)


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}])
def test_a_configuration_beside_the_model_decides(config, llama_model, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    processor, tokenizer = convert(llama_model, tmp_path)
    ends = [[processor.bos_id()] * ("add_bos_token" in config), [processor.eos_id()] * ("add_eos_token" in config)]
    assert tokenizer.encode("Hello there") == ends[0] + processor.encode("Hello there") + ends[1]


def test_sentencepiece_tokens_that_are_not_there(tmp_path):
    model = train_sentencepiece(bos_id=-1, eos_id=-1)
    for option, end in (("add_bos", "beginning"), ("add_eos", "end")):
        with pytest.raises(UserError, match=f"has no token for the {end} of a sequence"):
            convert(model, tmp_path, **{option: True})
    _, tokenizer = convert(model, tmp_path)
    assert tokenizer.eos_token_ids == ()


# tiktoken


def test_tiktoken_random_texts(qwen):
    encode, tokenizer = qwen
    for text in random_texts([*PARTS, *QWEN_SPECIAL[:4], "<|extra_204|>", "<|im_end|>", "<|extra_", "|>"], 3000):
        assert tokenizer.encode(text) == encode(text), repr(text)
        if unicodedata.is_normalized("NFC", text):  # a combining mark behind a token would have to unmake it
            assert tokenizer.encode(text, special_tokens=True) == encode(text, special_tokens=True), repr(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n",
        " \n \n  x",
        "x   y",
        "I'LL we've don't 'ſ",
        "123 456",
        "...\n\n",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n你好<|im_end|>",
        "<|extra_1|><|extra_10|><|extra_204|><|extra_205|>",
        "<|im_end|>\u0338",  # the last character and this are one in NFC
        "<|endoftext|>\u0338",
        "\u0338<|im_end|>",
        "e\u0301 \u1100\u1161\u11a8 \u212b \u0344",
        "👨‍👩‍👧🚀",
        "\ufb01 \u2460 \u0e4f \u3000\u00a0",
        WHOLE.decode(),
        WHOLE.decode() + "a",
        "哈" * 500 + " " * 300,
        *ROUND_TRIPS,
    ],
    ids=repr,
)
def test_tiktoken_text(qwen, text):
    encode, tokenizer = qwen
    ids = tokenizer.encode(text)
    assert ids == encode(text)
    normal = unicodedata.normalize("NFC", text)
    assert tokenizer.decode(ids) == normal
    if text == normal:
        ids = tokenizer.encode(text, special_tokens=True)
        assert ids == encode(text, special_tokens=True)
        assert tokenizer._tokenizer.decode(ids, skip_special_tokens=False) == normal


def test_a_whole_part_is_its_token_without_merges(qwen, ranks):
    assert qwen[1].encode(WHOLE.decode()) == [ranks[WHOLE]]


def test_tiktoken_special_tokens(qwen, ranks):
    _, tokenizer = qwen
    expected = tuple(range(len(ranks), len(ranks) + 208))
    assert tokenizer.special_token_ids(tuple(QWEN_SPECIAL)) == expected
    assert tokenizer.eos_token_ids == expected[:1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"YWI= 300 1", r"line 301: 'YWI= 300 1' is not a token in base64 and its rank"),
        (b"YWI=", r"line 301: 'YWI=' is not"),
        (b"", r"line 301: '' is not"),
        (b"YWI 300", r"line 301: 'YWI 300' is not"),
        (b"Y*I= 300", r"line 301: 'Y\*I= 300' is not"),
        (b"YWI= x", r"line 301: 'YWI= x' is not"),
        (b"\xff\xff 300", "line 301: .* is not"),
        (b"YWJjZA== 301", "line 301: the rank is 301; 300 is next"),
        (b"YWJjZA== 299", "line 301: the rank is 299; 300 is next"),
        (b"YWJjZA== -1", "line 301: the rank is -1; 300 is next"),
        (b"YQ== 300", r"line 301: the token b'a' is also on line \d+"),
    ],
)
def test_tiktoken_lines(ranks, tmp_path, line, message):
    path = tmp_path / "qwen.tiktoken"
    write_tiktoken(path, ranks)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:300], line, *lines[301:]]))
    with pytest.raises(UserError, match=rf"qwen\.tiktoken, {message}"):
        save_tiktoken(path, tmp_path, pattern=PATTERN, special_tokens=["<|end|>"], eos_token="<|end|>")


def test_tiktoken_files(ranks, tmp_path):
    path = tmp_path / "qwen.tiktoken"
    options = {"pattern": PATTERN, "special_tokens": ["<|end|>"], "eos_token": "<|end|>"}
    with pytest.raises(UserError, match=r"qwen\.tiktoken does not exist"):
        save_tiktoken(path, tmp_path, **options)
    write_tiktoken(path, dict(list(ranks.items())[:200]))
    with pytest.raises(UserError, match=r"qwen\.tiktoken has no token for the byte 0x[0-9A-F]{2}; all 256 are needed"):
        save_tiktoken(path, tmp_path, **options)
    write_tiktoken(path, ranks)
    for name in ("eos_token", "pad_token"):
        with pytest.raises(UserError, match=r"qwen\.tiktoken: '<other>' is not one of the special tokens <\|end\|>"):
            save_tiktoken(path, tmp_path, **{**options, name: "<other>"})
