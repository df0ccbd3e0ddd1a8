"""Tokenizers in GGUF files against the SentencePiece models that they were made of."""

import json

import gguf
import pytest
import sentencepiece
from gguf_files import byte_tokens
from sentencepiece import sentencepiece_model_pb2
from test_fast_tokenizer import MODELS, PARTS, edited, random_texts, train_sentencepiece

from trtbuild.checkpoint.gguf import read_metadata
from trtbuild.errors import UserError
from trtbuild.tokenizer import chat_template
from trtbuild.tokenizer.fast_tokenizer import save_sentencepiece
from trtbuild.tokenizer.gguf_tokenizer import save_tokenizer
from trtbuild.tokenizer.tokenizer import Tokenizer


def sentencepiece_metadata(model):
    """The metadata that llama.cpp's converter writes for a SentencePiece model."""
    pieces = sentencepiece_model_pb2.ModelProto.FromString(model).pieces
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [piece.piece for piece in pieces],
        "scores": [piece.score for piece in pieces],
        "token_type": [piece.type for piece in pieces],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def byte_level_metadata():
    tokens = byte_tokens()
    types = [3, 3, *[1] * (len(tokens) - 2)]
    ends = {"bos_token_id": 0, "eos_token_id": 1}
    return {"model": "gpt2", "pre": "smollm", "tokens": tokens, "token_type": types, "merges": ["h e", "1 2"], **ends}


def write(path, metadata, template=None):
    writer = gguf.GGUFWriter(path, "llama")
    adds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}
    for key, value in metadata.items():
        adds[type(value)](f"tokenizer.ggml.{key}", value)
    if template:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def convert(metadata, folder, **options):
    file = write(folder / "model.gguf", metadata, **options)
    save_tokenizer(file, read_metadata(file), folder / "converted")
    return Tokenizer(folder / "converted")


@pytest.fixture(scope="module")
def model():
    return train_sentencepiece(**MODELS["prefix"])


@pytest.mark.parametrize("name", ["prefix", "prefix, no symbols", "pieces of spaces", "no bytes"])
def test_same_file_as_from_the_sentencepiece_model(name, tmp_path):
    model = train_sentencepiece(**MODELS[name])
    convert(sentencepiece_metadata(model), tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model)
    save_sentencepiece(tmp_path / "tokenizer.model", tmp_path / "expected", add_bos=True)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "converted" / file).read_text() == (tmp_path / "expected" / file).read_text()


def test_published(published_tokenizer, tmp_path):
    """A space at the beginning, and what stands behind `<s>`, which transformers' own conversion gets wrong."""
    path = published_tokenizer("llama.model")
    tokenizer = convert(sentencepiece_metadata(path.read_bytes()), tmp_path)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert tokenizer.encode(" b") == [1, 29871, 289]
    for text in random_texts(PARTS, 500):
        assert tokenizer.encode(text) == [1, *processor.encode(text)], text
    ids = Tokenizer(tokenizer.folder, chat_template.read("llama2")).encode("hi", chat=True)
    assert ids == [1, *processor.encode("[INST] hi [/INST]")]
    assert ids[:3] == [1, 518, 25580]


@pytest.mark.parametrize("key", ["add_space_prefix", "add_bos_token", "add_eos_token"])
@pytest.mark.parametrize("value", [False, True])
def test_what_is_added_to_a_text(key, value, model, tmp_path):
    tokenizer = convert({**sentencepiece_metadata(model), key: value}, tmp_path)
    prefix = value if key == "add_space_prefix" else True
    processor = sentencepiece.SentencePieceProcessor(model_proto=edited(model, add_dummy_prefix=prefix))
    ends = {"add_bos": key != "add_bos_token" or value, "add_eos": key == "add_eos_token" and value}
    for text in ("the world", " the", "<reserved_106>the"):
        assert tokenizer.encode(text) == processor.encode(text, **ends)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_named_tokens(model, tmp_path):
    named = {"bos_token_id": 5, "eos_token_id": 6, "unknown_token_id": 0, "padding_token_id": 7}
    tokenizer = convert({**sentencepiece_metadata(model), **named}, tmp_path)._tokenizer
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert ids == tuple(named.values())


@pytest.mark.parametrize("add_bos", [False, True])
def test_byte_level(add_bos, tmp_path):
    """`transformers` would take the `tokenizer.json` that lies beside the file."""
    (tmp_path / "tokenizer.json").write_text("another model's")
    tokenizer = convert({**byte_level_metadata(), "add_bos_token": add_bos}, tmp_path)
    tokens = byte_tokens()
    ids = tokenizer.encode("he 1212 ü")
    assert [tokens[i] for i in ids] == ["<s>"] * add_bos + ["he", "Ġ", "1", "2", "1", "2", "Ġ", "Ã", "¼"]
    assert tokenizer.eos_token_ids == (1,)


def test_ends_of_a_turn_and_of_a_text(model, tmp_path):
    tokenizer = convert({**sentencepiece_metadata(model), "eot_token_id": 7, "eom_token_id": 2}, tmp_path)
    assert tokenizer.eos_token_ids == (2, 7)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_chat_template(kind, model, tmp_path):
    metadata = byte_level_metadata() if kind == "gpt2" else sentencepiece_metadata(model)
    tokenizer = convert({**metadata, "add_bos_token": False}, tmp_path, template="he{{ messages[0].content }}")
    assert tokenizer.encode("he", chat=True) == tokenizer.encode("hehe")


@pytest.mark.parametrize(
    ("kind", "key"),
    [("llama", key) for key in ("model", "tokens", "scores", "token_type")]
    + [("gpt2", key) for key in ("model", "tokens", "merges", "token_type")],
)
def test_a_missing_key(kind, key, model, tmp_path):
    metadata = byte_level_metadata() if kind == "gpt2" else sentencepiece_metadata(model)
    del metadata[key]
    with pytest.raises(UserError, match=rf"model\.gguf: the metadata key tokenizer\.ggml\.{key} is missing"):
        convert(metadata, tmp_path)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "a tokenizer of the kind 'bert' is not supported; llama and gpt2 are"),
        ({"scores": [0.0]}, "the tokens do not fit their scores or types"),
        ({"token_type": 3}, "the tokens do not fit their scores or types"),
        ({"eos_token_id": 5000}, "tokenizer.ggml.eos_token_id is 5000; there are 1200 tokens"),
    ],
    ids=json.dumps,
)
def test_metadata_that_does_not_fit(changes, message, model, tmp_path):
    with pytest.raises(UserError, match=rf"model\.gguf: {message}"):
        convert({**sentencepiece_metadata(model), **changes}, tmp_path)
