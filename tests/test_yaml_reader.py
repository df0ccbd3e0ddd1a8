"""YAML from outside: what is read, and what is refused with file and line."""

import time
from pathlib import Path

import pytest
import yaml

from trtbuild.errors import UserError
from trtbuild.limits import YAML_VALUES
from trtbuild.workflow import MODELS_SCHEMA, RECIPES_SCHEMA, load_table
from trtbuild.yaml_reader import read_yaml

CONFIG = Path(__file__).parents[1] / "config"


@pytest.fixture
def read(tmp_path):
    """The value of a text, read from the file `some.yaml`."""

    def read_text(text: str | bytes):
        (tmp_path / "some.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_yaml(tmp_path / "some.yaml")

    return read_text


@pytest.fixture
def refused(read, tmp_path):
    """Why a text is refused, from the file's name on."""

    def reason(text: str | bytes) -> str:
        with pytest.raises(UserError) as caught:
            read(text)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(f"{tmp_path}/", "")

    return reason


@pytest.mark.parametrize("path", [*CONFIG.glob("*.yaml"), *CONFIG.glob("schemas/*.yaml")], ids=lambda path: path.name)
def test_shipped_files_are_what_pyyaml_reads(path):
    assert read_yaml(path) == yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: &x {b: 1, c: [2, no, 1.5, ~, text]}\nd: *x\n",
        "a: &x {b: 1, c: 2}\nd: {<<: *x, c: 3}\n",
        "a: &x {b: 1}\nc: &y {b: 2, d: 3}\ne: {<<: [*x, *y]}\n",
        "'no': {'7': no}",
    ],
)
def test_what_is_read_as_pyyaml_does(read, text):
    assert read(text) == yaml.safe_load(text)


@pytest.mark.parametrize("date", ["2024-01-01", "2024-13-45"])
def test_dates_are_text(read, date):
    assert read(f"revision: {date}") == {"revision": date}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: 1\nb: {}\na: 2\n", "some.yaml, line 3: the key a is there already, in line 1"),
        ("a:\n  b: {c: 1, d: 2,\n    c: 3}\n", "some.yaml, line 3: the key c is there already, in line 2"),
        ("a: 1\n'a': 2\n", "some.yaml, line 2: the key a is there already, in line 1"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x\n", "some.yaml, line 4: the key << is there already, in line 3"),
        ("a: 1\nno: {}\n", "some.yaml, line 2: YAML takes the key no for bool; write 'no'"),
        ("7: {}", "some.yaml, line 1: YAML takes the key 7 for int; write '7'"),
        ("a: {1.5: {}}", "some.yaml, line 1: YAML takes the key 1.5 for float; write '1.5'"),
        ("~: {}", "some.yaml, line 1: YAML takes the key ~ for null; write '~'"),
        ("? [a]\n: 1", "some.yaml, line 1: a key must be text"),
        ("a: .nan", "some.yaml, line 1: '.nan' is no value that JSON has"),
        ("a: -.INF", "some.yaml, line 1: '-.INF' is no value that JSON has"),
        ("a: !!set {b}", "some.yaml, line 1: 'set' is no value that JSON has"),
        ("a: !!python/object/apply:os.getcwd []", "some.yaml, line 1: 'python/object/apply:os.getcwd' is no value"),
        ("a: !!bool maybe", "some.yaml is not valid YAML: 'maybe'"),
        ("a: " + "9" * 5000, "some.yaml is not valid YAML: Exceeds the limit"),
        ("a: [\n", "some.yaml is not valid YAML: while parsing a flow node expected the node content"),
        ("a: b: c", "some.yaml is not valid YAML: mapping values are not allowed here in line 1, column 5"),
        ("a: 1\n---\nb: 1", "some.yaml is not valid YAML: expected a single document"),
        ("a: *b", "some.yaml is not valid YAML: found undefined alias 'b'"),
        ("a: {<<: 1}", "some.yaml is not valid YAML: while constructing a mapping"),
        (b"\xff\xfe\x00", "some.yaml is not UTF-8 text: 'utf-8' codec can't decode"),
        ("[" * 3000, "some.yaml is not valid YAML: it is nested too deeply"),
    ],
)
def test_what_is_refused(refused, text, reason):
    assert refused(text).startswith(reason)


@pytest.mark.parametrize(("first", "more"), [("[1, 1]", "[{}]"), ("{a: 1}", "{{<<: [{}]}}")])
def test_aliases_of_aliases(refused, first, more):
    """9 to the power of 11 values in some lines; none of them is made."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{i}: &a{i} " + more.format(", ".join([f"*a{i - 1}"] * 9)) for i in range(1, 12)]
    start = time.process_time()
    assert f"more than {YAML_VALUES} values, aliases written out" in refused("\n".join(lines))
    assert time.process_time() - start < 5


def test_an_alias_within_itself(refused):
    assert "an alias is used too often" in refused("a: &a [*a]")


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("schema", "entry"), [(MODELS_SCHEMA, "{source: {local: {path: x}}}"), (RECIPES_SCHEMA, "{dtype: float16}")]
)
def test_tables_are_read_by_it(tmp_path, schema, entry):
    path = tmp_path / "table.yaml"
    for key in ("7", "no", "mine"):
        path.write_text(f"mine: {entry}\n{key}: {entry}\n")
        with pytest.raises(UserError, match=r"table.yaml, line 2: "):
            load_table(str(path), schema)
    path.write_text(f"mine: {entry}\n'7': {entry}\n'no': {entry}\n")
    assert set(load_table(str(path), schema)) == {"mine", "7", "no"}
