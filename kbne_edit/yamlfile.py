"""YAML read strictly: bounded, without aliases, each key once, and yes/no as the words that they are."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError
from .files import open_input

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_yaml(path: str | Path, most_bytes: int = 1 << 20) -> tuple[object, bytes]:
    """The document in a file, and the bytes it was read from. Raises InputError.

    A YAML reader in Python takes seconds for a megabyte, hence the bound.
    """
    with open_input(path, InputError) as file:
        raw = file.read(most_bytes + 1)
    if len(raw) > most_bytes:
        raise InputError(f"not YAML that can be read: more than {most_bytes >> 10} KB")
    try:
        return yaml.load(raw.decode("utf-8"), _Loader), raw
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # The library raises nearly all of these for a value that its explicit tag does not fit.
        raise InputError("not YAML that can be read: " + " ".join(str(error).split())[:200]) from None


def has_lone_surrogate(text: str) -> bool:
    """Half a character, which an escape can write and no file can hold. Quick: hostile text is long."""
    return not text.isascii() and _SURROGATE.search(text) is not None


class _Loader(yaml.SafeLoader):
    """YAML 1.2 on the two points that hurt: bare yes/no are strings, and a key may stand only once.

    No aliases: a few lines of them describe more text than memory holds.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases (*name) are not read, line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        counts = Counter(str(key.value) for key, _ in node.value)
        if twice := sorted(key for key, count in counts.items() if count > 1):
            raise yaml.YAMLError(f"key {', '.join(twice)} appears twice in line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
