"""Prompts from files: what each format means, and the line in which it does not."""

import csv
import json

import numpy as np
import pytest

from trtbuild.errors import UserError
from trtbuild.runtime.prompts import padded_rows, read_prompts, write_csv, write_npy


def prompts_of(path, ends=()):
    return [prompt for _, prompt in read_prompts(path, ends)]


ROWS = [[5], [3, 2, 319], [7, 7, 7, 7]]
HEADER = "{'descr': '<i4', 'fortran_order': False, 'shape': %s}\n"


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.md"])
def test_text(tmp_path, name):
    (tmp_path / name).write_bytes(b"  one \n\n \t\n1,2,3\r\n{}\nlast")
    assert prompts_of(tmp_path / name) == ["  one ", "1,2,3", "{}", "last"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("p.txt", "\none\n\ntwo"), ("p.csv", "\n5\n\n6"), ("p.jsonl", '\n{"text": "a"}\n\n{"text": "b"}')],
)
def test_where_each_is(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    assert [where for where, _ in read_prompts(tmp_path / name)] == [f"{tmp_path / name}: line {i}" for i in (2, 4)]
    np.save(tmp_path / "p.npy", np.array([[5], [6]]))
    assert [where for where, _ in read_prompts(tmp_path / "p.npy")] == [f"{tmp_path}/p.npy: row {i}" for i in (0, 1)]


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\ufeffWhat is a star?\nAnd a planet?\n", encoding="utf-8")
    assert prompts_of(path) == ["What is a star?", "And a planet?"]


def test_csv(tmp_path):
    """As Python's own module writes it, and by hand."""
    path = tmp_path / "prompts.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(ROWS)
    assert prompts_of(path) == ROWS
    path.write_text("5\n\n 3, 2 ,319\n7,7,7,7")
    assert prompts_of(path) == ROWS


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint16", "int8"])
@pytest.mark.parametrize("left", [False, True])
def test_npy(tmp_path, dtype, left):
    """Ends within a prompt are its own."""
    rows = [[5], [3, 2, 4, 2, 9], [7, 7, 7, 7]]
    pads = [[2] * (6 - len(row)) for row in rows]
    np.save(tmp_path / "p.npy", np.array([p + r if left else r + p for r, p in zip(rows, pads, strict=True)], dtype))
    assert prompts_of(tmp_path / "p.npy", (1, 2)) == rows
    if dtype != "uint16":
        pads = [[-1] * len(pad) for pad in pads]
        padded = [p + r if left else r + p for r, p in zip(rows, pads, strict=True)]
        np.save(tmp_path / "p.npy", np.array(padded, dtype))
        assert prompts_of(tmp_path / "p.npy", (1,)) == rows


def test_json_lines(tmp_path):
    lines = [{"input_ids": [5, 6], "text": "no"}, {"prompt": "ä\n", "text": "no"}, {"text": "yes", "other": None}]
    (tmp_path / "p.JSONL").write_text("\n\n".join(json.dumps(line) for line in lines))
    assert prompts_of(tmp_path / "p.JSONL") == [[5, 6], "ä\n", "yes"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "1,2\n\n3,x\n", "p.csv: line 3 has 'x' where a token id is expected"),
        ("p.csv", "1,2,\n", "p.csv: line 1 has '' where"),
        ("p.csv", "1,-2\n", "p.csv: line 1 has '-2' where"),
        ("p.csv", "1_0\n", "p.csv: line 1 has '1_0' where"),
        ("p.csv", "Who are you?\n", "line 1 has 'Who are you.' where .*; texts go into|texts go into"),
        ("p.jsonl", '{"text": "a"}\n{"text": 5}', "p.jsonl: line 2: text is 5; a text is expected"),
        ("p.jsonl", '{"prompt": ""}', "p.jsonl: line 1: prompt is ''; a text is expected"),
        ("p.jsonl", '{"input_ids": []}', "p.jsonl: line 1: input_ids is ..; a list of token ids is expected"),
        ("p.jsonl", '{"input_ids": [1, -1]}', "line 1: input_ids is .1, -1.; a list of token ids"),
        ("p.jsonl", '{"input_ids": [true]}', "line 1: input_ids is .True.; a list of token ids"),
        ("p.jsonl", '{"article": "x"}', "p.jsonl: line 1 is no object with one of input_ids, prompt, text"),
        ("p.jsonl", '["x"]', "p.jsonl: line 1 is no object with one of"),
        ("p.jsonl", '\n{"text":\n', "p.jsonl: line 2 is not valid JSON"),
        ("p.npy", "no array", "p.npy is no .npy file that can be read"),
        ("p.txt", b"\xff", "p.txt is not UTF-8 text"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_wrong_line_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message):
        prompts_of(tmp_path / name)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.5]]), r"holds float64 \[1, 1\]; an array of integers \[prompts, length\] is expected"),
        (np.array([1, 2]), r"holds int64 \[2\]"),
        (np.array([[True]]), "holds bool"),
        (np.array([[5, 6], [2, -1]]), "row 1 holds padding alone"),
    ],
    ids=["floats", "one row", "flags", "padding"],
)
def test_a_wrong_array_is_refused(tmp_path, array, message):
    np.save(tmp_path / "p.npy", array)
    with pytest.raises(UserError, match=message):
        prompts_of(tmp_path / "p.npy", (2,))


def test_nothing_is_unpickled(tmp_path):
    np.save(tmp_path / "p.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"is no \.npy file that can be read"):
        prompts_of(tmp_path / "p.npy")


@pytest.mark.parametrize(
    "header", ["{'descr': (", "-" * 9000 + "1", HEADER % "(True, True)", HEADER % f"({10**40}, 2)"]
)
def test_a_header_that_numpy_stumbles_over(tmp_path, header):
    """Unfinished, nested too deeply, and with shapes that are none: each is another exception of numpy's."""
    (tmp_path / "p.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    with pytest.raises(UserError, match=r"is no \.npy file that can be read"):
        prompts_of(tmp_path / "p.npy")


def test_a_header_that_promises_more_than_there_is(tmp_path):
    with open(tmp_path / "p.npy", "wb") as file:
        header = {"descr": "<i4", "fortran_order": False, "shape": (4, 1 << 40)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(64))
    with pytest.raises(UserError, match=r"is no \.npy file that can be read"):
        prompts_of(tmp_path / "p.npy")


def test_rows_come_back(tmp_path):
    rows = padded_rows(ROWS, 6, 2)
    assert (rows.dtype, rows[0].tolist()) == (np.int32, [5, 2, 2, 2, 2, 2])
    write_npy(tmp_path / "rows.npy", rows)
    assert prompts_of(tmp_path / "rows.npy", (2,)) == ROWS
    write_csv(tmp_path / "rows.csv", rows)
    assert prompts_of(tmp_path / "rows.csv") == rows.tolist()
