"""Damage: each function changes one whole file at random, in its own way."""

import functools
import json
import math
import os
import socket
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from random import Random

import gguf
import numpy as np
import yaml
from sentencepiece import sentencepiece_model_pb2

Damage = Callable[[Path, Random], None]

TEMPLATES = (
    *("{{ 'a' * 10**10 }}", "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}", "{{"),
    *("{{ raise_exception('no') }}", "{% include '/etc/passwd' %}", "{{ messages[5].content }}", "{% for %}", ""),
    *("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ 1 // 0 }}", "{{ '%100000000d' | format(1) }}", "\ud800"),
    *("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 2 ** 10 ** 10 }}", "{{ messages | tojson * 10**9 }}"),
    *("{{ x.y.z }}", "{% set x = range(10**8) | list %}", "{{ ('a' * 10**6) | wordwrap(1) }}", "{{ messages }}"),
)
# Written where the text of a file has the mark, since no serializer writes them.
MARKS = {"@deep@": "[" * 100_000 + "]" * 100_000, "@digits@": "9" * 5000, "@huge@": "1e999"}
NUMBERS = (0, 1, -1, 2, 3, 0.5, -0.0, 1e308, 2**31 - 1, 2**31, 2**63, 2**64, math.nan, math.inf, -math.inf)
STRINGS = ("", "1", "1e6", "false", "float16", "\ud800", "\x00", "../../x", "/dev/zero", "x" * 5000, "ａ", *TEMPLATES)
VALUES = (None, True, False, *NUMBERS, *STRINGS, *MARKS, [], {}, [[]], [None], {"": 0}, [1, 2], {"type": "x"})
ALIASES = "".join(f"z{i}: &b{i} [{', '.join([f'*b{i - 1}' if i else 'x'] * 9)}]\n" for i in range(10))
YAML = (
    *("2024-13-45", "2024-01-01", "!!python/object/apply:os.system [id]", "&a [*a]", "*missing", "1e6", "no", "0o17"),
    *("{a: 1, a: 2}", "{[1]: 2}", "{? {a: 1} : 2}", "!!binary x", "!!set {a, b}", "!!int x", "!!float", "'", '"\\x"'),
    *("|\n\ttab", "{<<: 5}", "{1: 2}", "{null: 1}", "{no: 1}", "[1, 2", "%", "@", "!!timestamp 2001-02-30", "--- x"),
    f"x\n{ALIASES}",
)
GROWING = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 30}
SPLIT = {"type": "Split", "pattern": {"Regex": "(([a-z])+.)+[A-Z]([a-z])+$"}, "behavior": "Isolated", "invert": False}
TOKEN = {"id": 10**9, "content": "star", "special": True}
PADDING = {"strategy": {"Fixed": 10**10}, "direction": "Left", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0}
COMPONENTS = (  # of a tokenizer.json: what works badly, or not at all
    {"normalizer": {"type": "Sequence", "normalizers": [GROWING] * 8}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
    {"pre_tokenizer": SPLIT},
    {"pre_tokenizer": None},
    {"pre_tokenizer": {"type": "Metaspace", "replacement": "xx", "prepend_scheme": "always"}},
    {"post_processor": {"type": "BertProcessing", "sep": ["x", 99999], "cls": ["y", 99999]}},
    {"post_processor": {"type": "TemplateProcessing", "single": [TOKEN], "pair": [], "special_tokens": {}}},
    {"decoder": None},
    {"decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}},
    {"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0]]}},
    {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}},
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": [["a", "b"]]}},
    {"model": {"type": "BPE", "vocab": {"a": 2**32 - 1, "s": 1}, "merges": []}},
    {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 5}},
    {"padding": PADDING | {"pad_token": ""}},
    {"added_tokens": [TOKEN | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)]},
)


def of_bytes(change: Callable[[bytearray, Random], bytes]) -> Damage:
    @functools.wraps(change)
    def damage(path: Path, random: Random) -> None:
        path.write_bytes(change(bytearray(path.read_bytes()), random))

    return damage


def special(path: Path, random: Random) -> None:
    """Something else than a file, or nothing."""
    path.unlink()
    match random.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to(random.choice((path.name, "nowhere", ".")))
        case 3:
            path.symlink_to(random.choice(("/dev/zero", "/dev/null", "/dev/full", "/dev/random")))
        case 4:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(os.path.relpath(path))
        case 5:
            path.touch()


# Bytes


def place(content: bytes, random: Random) -> int:
    """A position; where headers are as often as anywhere."""
    anywhere = (random.randrange(16), random.randrange(2000), int(random.random() * len(content)))
    return min(random.choice(anywhere), max(0, len(content) - 1))


def span(content: bytes, random: Random) -> slice:
    start = place(content, random)
    return slice(start, start + random.choice((1, 2, 4, 8, 64, 1000)))


@of_bytes
def content(content, random):
    """Cut, flipped, overwritten, inserted, removed, repeated, exchanged, appended."""
    part, other = span(content, random), span(content, random)
    match random.randrange(9):
        case 0:
            del content[random.choice((part.start, -random.randrange(1, 100))) :]
        case 1 | 2:
            for _ in range(random.choice((1, 1, 3, 100)) if content else 0):
                content[place(content, random)] ^= 1 << random.randrange(8)
        case 3:
            new = random.choice((b"\xff", b"\0", b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"-1", b"\xed\xa0\x80"))
            content[part.start : part.start + len(new)] = new
        case 4:
            new = random.choice((b"\0", b"\n", b"\xef\xbb\xbf", random.randbytes(7), b" " * 999))
            content[part.start : part.start] = new
        case 5:
            del content[part]
        case 6:
            content[part] = content[part] * random.choice((2, 2, 1000))
        case 7 if part.stop <= other.start:
            content[part], content[other] = content[other], content[part]
        case 8:
            content += random.choice((b"\0", b"\n{}", b"\0" * 4096, random.randbytes(100), b"\xff"))
    return content


@of_bytes
def lines(content, random):
    """Whole lines exchanged, repeated, removed or joined; a word replaced; another encoding."""
    rows = content.split(b"\n")
    i, j = (random.randrange(len(rows)) for _ in range(2))
    match random.randrange(6):
        case 0:
            rows[i], rows[j] = rows[j], rows[i]
        case 1:
            rows.insert(i, rows[j])
        case 2:
            del rows[i]
        case 3:
            rows[i : i + 2] = [b" ".join(rows[i : i + 2])]
        case 4:
            words = rows[i].split(b" ")
            words[random.randrange(len(words))] = str(random.choice(VALUES)).encode("utf-8", "replace")
            rows[i] = b" ".join(words)
        case 5:
            encoding = random.choice(("utf-16", "utf-8-sig", "cp1252"))
            return content.decode("utf-8", "replace").encode(encoding, "replace")
    return b"\n".join(rows)


@of_bytes
def template(content, random):
    new = random.choice(TEMPLATES).encode("utf-8", "surrogatepass")
    return random.choice((new, content + new))


@of_bytes
def yaml_text(content, random):
    """What YAML alone can say, in the place of a value."""
    rows = content.decode("utf-8", "surrogateescape").split("\n")
    i = random.randrange(len(rows))
    key, colon, _ = rows[i].partition(": ")
    rows[i] = f"{key}: {random.choice(YAML)}" if colon else f"{rows[i]} {random.choice(YAML)}"
    return "\n".join(rows).encode("utf-8", "surrogateescape")


# Values in a structure


def changed(value: object, random: Random) -> object:
    """`value` with one place in it changed; a string that holds JSON is such a place, too."""
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.dumps(changed(json.loads(value), random))
        except ValueError:
            pass
    if not isinstance(value, dict | list) or not value or random.random() < 0.1:
        return another(value, random)
    value = value.copy()
    keys = list(value) if isinstance(value, dict) else range(len(value))
    key, other = random.choice(keys), random.choice(keys)
    match random.choice((*["deeper"] * 7, "removed", "exchanged", "renamed")):
        case "deeper":
            value[key] = changed(value[key], random)
        case "removed":
            del value[key]
        case "exchanged":
            value[key], value[other] = value[other], value[key]
        case "renamed" if isinstance(value, dict):
            value[random.choice((*STRINGS, f"{key}x"))] = value.pop(key)
        case "renamed":
            value.insert(other, value[key])
    return value


def another(value: object, random: Random) -> object:
    """The same in another type or size, or something else."""
    similar = [[value], {"x": value}, str(value), [value] * 3]
    if isinstance(value, int | float) and abs(value) < 2**60:
        similar += [value + 1, value - 1, -value, value * 2, value * 10**6, value // 2, float(value), int(value)]
    if isinstance(value, list):
        similar += [value[:-1], value + value, dict(enumerate(value)), value[::-1]]
    return random.choice((*similar, *random.sample(VALUES, len(similar))))


def values(path: Path, random: Random) -> None:
    """Of JSON, JSON lines, YAML, and of the JSON that safetensors begin with."""

    def as_json(text: bytes) -> bytes:
        return marked(json.dumps(changed(json.loads(text), random)))

    def marked(text: str) -> bytes:
        for mark, meaning in MARKS.items():
            text = text.replace(f'"{mark}"', meaning).replace(f"'{mark}'", meaning)
        return text.encode("utf-8", "surrogatepass")

    content = path.read_bytes()
    match path.suffix:
        case ".safetensors":
            (size,) = struct.unpack_from("<Q", content)
            header = as_json(content[8 : 8 + size])
            content = struct.pack("<Q", len(header)) + header + content[8 + size :]
        case ".yaml":
            content = marked(yaml.safe_dump(changed(yaml.safe_load(content), random), sort_keys=False))
        case ".jsonl":
            rows = content.splitlines()
            i = random.randrange(len(rows))
            rows[i] = as_json(rows[i])
            content = b"\n".join(rows) + b"\n"
        case _:
            content = as_json(content)
    path.write_bytes(content)


def components(path: Path, random: Random) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | random.choice(COMPONENTS)))


# Containers


def member(path: Path, random: Random) -> None:
    """Of a ZIP archive, whose checksums are right afterwards."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = random.choice([*members, *[name for name in members if name.endswith(".pkl")] * 5])
    match random.randrange(8):
        case 0:
            members[name] = members[name][: place(members[name], random)]
        case 1:
            del members[name]
        case 2:
            members[random.choice((f"{name}x", "x", "../x", name.upper()))] = members.pop(name)
        case 3:
            members[name] += b"\0" * 4
        case 4:
            members[random.choice(list(members))] = members[name]
        case 5 | 6 if members[name]:
            changed = bytearray(members[name])
            changed[place(changed, random)] = random.choice((random.randrange(256), 0, 255, ord(".")))
            members[name] = changed
    with zipfile.ZipFile(path, "w", random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, data in members.items():
            archive.writestr(name, bytes(data))


@np.errstate(all="ignore")
def arrays(path: Path, random: Random) -> None:
    """Of an `.npz`: values, shapes, types and names."""
    with np.load(path) as file:
        found = dict(file)
    name = random.choice(list(found))
    x = found[name] if found[name].dtype.kind == "f" else np.ones(3, np.float32)
    text = changed(json.loads(str(found["origin"])), random) if "origin" in found else {}
    one_bad = [np.where(np.arange(x.size) == 1, bad, x.ravel()).astype("f4") for bad in (np.nan, -1, np.inf, 0)]
    scaled = [x * scale for scale in (0, 1e38, -1, 1e-42)]
    typed = [x.astype(dtype) for dtype in (">f4", "f8", "f2", "i4", "c8", "U", "?")]
    shaped = [x.ravel()[:-1], x[None], np.float32(1), x[:0], np.array([{}], dtype=object)]
    texts = [np.array(word) for word in ("{}", "\ud800", "x", json.dumps(text))]
    found[name] = random.choice((*one_bad, *scaled, *typed, *shaped, *texts))
    if random.random() < 0.2:
        found[random.choice(("x", f"{name}x", "origin"))] = found.pop(name)
    buffer = BytesIO()
    np.savez(buffer, **found)
    path.write_bytes(buffer.getvalue())


@np.errstate(all="ignore")
def fields(path: Path, random: Random) -> None:
    """One number or string of a GGUF's metadata or of what it says of a tensor; its length stays."""
    content = bytearray(path.read_bytes())
    reader = gguf.GGUFReader(path)
    field = random.choice(random.choice((list(reader.fields.values()), [tensor.field for tensor in reader.tensors])))
    i = random.randrange(len(field.parts))
    part, start = field.parts[i], field.offset + sum(part.nbytes for part in field.parts[:i])
    size = part.nbytes
    if part.dtype == np.uint8:
        new = random.choice((random.randbytes(size), b"\xff" * size, bytes(part)[::-1], b"x" * size))
    else:
        numbers = NUMBERS if part.dtype.kind == "f" else (*range(32), -1, 2**31, 2**62, 2**63 - 1)
        chosen = np.full(part.shape, random.choice(numbers)).astype(part.dtype)
        new = random.choice((part + 1, part - 1, part * 2, part + 32, chosen, chosen)).astype(part.dtype).tobytes()
    content[start : start + size] = new
    path.write_bytes(content)


def pieces(path: Path, random: Random) -> None:
    """Of a SentencePiece model, and its settings."""
    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    piece, other = random.choice(model.pieces), random.choice(model.pieces)
    match random.randrange(7):
        case 0:
            piece.score = random.choice((math.nan, math.inf, 0, -1, other.score))
        case 1:
            piece.piece = random.choice((other.piece, "", "▁" * 9, "x" * 5000, "<s>", "\x00"))
        case 2:
            piece.type = random.randrange(1, 7)
        case 3:
            model.trainer_spec.model_type = random.randrange(1, 5)
        case 4:
            part = random.choice((model.normalizer_spec, model.trainer_spec))
            part.ClearField(random.choice([field.name for field, _ in part.ListFields()]))
        case 5:
            model.normalizer_spec.precompiled_charsmap = random.randbytes(random.choice((4, 100)))
        case 6:
            del model.pieces[random.randrange(len(model.pieces)) :]
    path.write_bytes(model.SerializeToString())


TEXT = (*(values,) * 4, lines)
OF = {
    **dict.fromkeys((".json", ".jsonl"), TEXT),
    ".yaml": (*TEXT, *(yaml_text,) * 3),
    ".safetensors": (values,) * 3,
    ".gguf": (fields,) * 6,
    ".npz": (member, *(arrays,) * 4),
    **dict.fromkeys((".bin", ".pth"), (member,) * 3),
    ".model": (pieces,) * 3,
    ".jinja": (template,) * 3,
    "tokenizer.json": (*TEXT, *(components,) * 3),
}


def damages(file: str) -> tuple[Damage, ...]:
    """What may happen to a file of this name, the frequent more than once."""
    path = Path(file)
    return (*(content,) * 3, special, *OF.get(path.name, OF.get(path.suffix, (lines,))))
