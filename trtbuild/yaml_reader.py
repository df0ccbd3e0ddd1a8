"""YAML from outside, read as JSON's kinds of values, and without what YAML 1.1 does behind one's back."""

from pathlib import Path
from typing import Any

import yaml

from trtbuild.errors import UserError
from trtbuild.files import read_text
from trtbuild.limits import YAML_VALUES

TAG = "tag:yaml.org,2002:"
KINDS = {TAG + kind for kind in ("map", "seq", "str", "int", "float", "bool", "null")}


class _Loader(yaml.SafeLoader):
    """Dates are text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != TAG + "timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_yaml(path: Path | str) -> Any:
    """The one document in a file; anchors, aliases and merge keys (`<<`) mean what they do in YAML 1.1.

    Raises `UserError` with file and line for malformed YAML, a key that is twice in a mapping (YAML 1.1 would take the
    last one), a key that is not text (`no`, `7`), a value that JSON does not have, and more than `YAML_VALUES` values.
    """
    try:
        loader = _Loader(read_text(path))
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, path, {})
        return loader.construct_document(node)
    except RecursionError as error:
        raise UserError(f"{path} is not valid YAML: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, LookupError) as error:  # also of what a tag does not fit
        reason = " ".join(str(error).replace('in "<unicode string>", ', "in ").split())
        raise UserError(f"{path} is not valid YAML: {reason}") from error


def _check(node: yaml.Node, path: Path | str, sizes: dict[int, int]) -> int:
    """How many values a node stands for. `sizes` holds those of all nodes seen so far, by identity."""
    if (size := sizes.get(id(node))) is not None:
        return size
    where = f"{path}, line {node.start_mark.line + 1}"
    if node.tag not in KINDS or (node.tag == TAG + "float" and str(node.value)[-4:].lower() in (".inf", ".nan")):
        what = node.value if isinstance(node, yaml.ScalarNode) else node.tag.removeprefix(TAG)
        raise UserError(f"{where}: {what!r} is no value that JSON has")
    sizes[id(node)] = YAML_VALUES  # for an alias within what it is an alias of
    if isinstance(node, yaml.ScalarNode):
        children = []
    elif isinstance(node, yaml.MappingNode):
        _check_keys([key for key, _ in node.value], path)
        children = [value for _, value in node.value]
    else:
        children = node.value
    size = 1 + sum(_check(child, path, sizes) for child in children)
    if size > YAML_VALUES:
        raise UserError(f"{where}: more than {YAML_VALUES} values, aliases written out; an alias is used too often")
    sizes[id(node)] = size
    return size


def _check_keys(keys: list[yaml.Node], path: Path | str) -> None:
    lines: dict[str, int] = {}
    for key in keys:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise UserError(f"{path}, line {line}: a key must be text")
        if key.tag not in (TAG + "str", TAG + "merge"):
            kind = key.tag.removeprefix(TAG)
            raise UserError(f"{path}, line {line}: YAML takes the key {key.value} for {kind}; write '{key.value}'")
        if key.value in lines:
            raise UserError(f"{path}, line {line}: the key {key.value} is there already, in line {lines[key.value]}")
        lines[key.value] = line
