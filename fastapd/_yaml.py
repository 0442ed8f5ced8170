"""A strict YAML reader: only plain mappings, lists and scalars of YAML 1.2, every refusal with its line.

Reading is stricter than `yaml.safe_load`, as a misread configuration costs a whole run: there `lr: 1e-3` is text, `no`
is False, `1:30` is 90, the second of two equal keys wins, and a few hundred bytes of aliases fill the memory.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any, ClassVar, NoReturn

import yaml
from pydantic import BaseModel

MAX_BYTES = 1 << 20  # of a configuration file
MAX_DEPTH = 32  # of nested YAML nodes; a valid configuration has 3
MAX_NODES = 10_000  # keys and values; reading a MiB of them would take ten seconds


class ConfigError(ValueError):
    """A configuration that cannot be used; one line a problem."""


def show(value: Any) -> str:
    """`value` for a message, short whatever it is (repr of 10**5000 raises, of a deep list exhausts the stack)."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping | list | tuple | BaseModel):
        return "a mapping" if isinstance(value, Mapping) else f"{type(value).__name__}(...)"
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return text if len(text := repr(value)) <= 80 else f"{text[:77]}..."


PLAIN = {  # what a plain scalar is: the YAML 1.2 core schema in decimal, and `_` between digits
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"[-+]?[0-9](?:_?[0-9])*\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9](?:_?[0-9])*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}
_TAG = "tag:yaml.org,2002:"


class _StrictLoader(yaml.SafeLoader):
    """Plain mappings, lists and scalars; no aliases, anchors, merge keys, tags or repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self.source, self.depth, self.nodes = source, 0, 0

    def refuse(self, mark: yaml.Mark, condition: str, got: str) -> NoReturn:
        raise ConfigError(f"config: {self.source} line {mark.line + 1} must {condition}, got {got}")

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        if event.anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            self.refuse(event.start_mark, "not use anchors and aliases", f"{sign}{event.anchor}")
        if event.tag is not None:
            self.refuse(event.start_mark, "not use tags", show(event.tag))
        if self.depth == MAX_DEPTH or self.nodes == MAX_NODES:
            self.refuse(event.start_mark, f"stay within {MAX_DEPTH} levels and {MAX_NODES} keys and values", "one more")
        self.depth, self.nodes = self.depth + 1, self.nodes + 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[str, int] = {}
        for key, _ in node.value:
            if key.tag != f"{_TAG}str":
                got = show(key.value) if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
                self.refuse(key.start_mark, "have text as its key", got)
            if key.value == "<<" and key.style is None:
                self.refuse(key.start_mark, "not use merge keys", "'<<'")
            if key.value in first:
                self.refuse(key.start_mark, f"not repeat the key of line {first[key.value]}", show(key.value))
            first[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value.replace("_", "").lower()
        if len(text) > 400:  # no number of a configuration; Python raises on thousands of digits
            self.refuse(node.start_mark, "hold a number of at most 400 digits", f"one of {len(text)}")
        return int(text) if node.tag == f"{_TAG}int" else float(re.sub(r"\.(?=[in])", "", text))  # .inf, .nan


class StrictDumper(yaml.SafeDumper):
    """Quotes every text that this reader or one for YAML 1.1 would take for something else."""


for _name, _pattern in PLAIN.items():
    _StrictLoader.add_implicit_resolver(f"{_TAG}{_name}", _pattern, None)
    StrictDumper.add_implicit_resolver(f"{_TAG}{_name}", _pattern, None)
for _name in ("int", "float"):
    _StrictLoader.add_constructor(f"{_TAG}{_name}", _StrictLoader.construct_number)


def loads(text: str, source: str = "<string>") -> dict[str, Any]:
    """Read a YAML text strictly; the result is not yet validated (`parse` does that).

    Numbers are those of YAML 1.2: `1e-3`, `7e-1`, `.5` and `3E-2` are floats, `20_000` is an integer, `010` is ten.
    Only `true` and `false` (or `True`, `TRUE`, ...) are booleans; `no`, `on`, `1:30` and dates stay text. A quoted
    number is text, and `parse` refuses it for a number's key with the hint to drop the quotes.

    Args:
        text: at most 1 MiB in UTF-8.
        source: what to call the text in messages.

    Raises:
        ConfigError: not YAML; an alias, anchor, tag, merge key, repeated key, key that is not text, second document,
            too deep or too long a text; or a top level that is not a mapping.
    """
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "replace")) > MAX_BYTES:
        raise ConfigError(f"config: {source} must have at most {MAX_BYTES} bytes, got more")
    try:
        data = _StrictLoader(text, source).get_single_data()
    except yaml.YAMLError as exc:
        mark = getattr(exc, "problem_mark", None)
        where = f"{source} line {mark.line + 1}" if mark else source
        got = ", ".join(filter(None, (getattr(exc, name, None) for name in ("context", "problem", "reason"))))
        raise ConfigError(f"config: {where} must be YAML, got: {got}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"config: {source} must hold a mapping, got {show(data)}")
    return data
