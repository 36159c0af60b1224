"""YAML without its traps: 2:4 is text and not 124, 1e-3 is a number, no key comes twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

from llmprune.base.errors import RecipeError, first_line

MOST_OPEN = 100  # more take the parser minutes, and no recipe nests so deeply
_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
_INT_TEXT = re.compile(r"[-+]?(0|[1-9][\d_]*)$")
_FLOAT_TEXT = re.compile(
    r"([-+]?((\d+\.\d*|\.\d+)([eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(inf|Inf|INF))|\.(nan|NaN|NAN))$"
)


def load(text: str) -> Any:
    """Read YAML text into plain data.

    Raises RecipeError whose message begins with the place: `, line 3, column 1: ...`.

    >>> load("{pattern: 2:4, damping: 1e-3}")
    {'pattern': '2:4', 'damping': 0.001}
    """
    if max(text.count("[") - text.count("]"), text.count("{") - text.count("}")) > MOST_OPEN:
        raise RecipeError(f": more than {MOST_OPEN} brackets are opened and not closed.")
    try:
        return yaml.load(text, Loader=_Loader)
    except (
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # dates, odd keys, depth
        raise RecipeError(f": {first_line(error)}.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise RecipeError(f"{place}: {getattr(error, 'problem', None) or error}.") from error


def dump(data: Any) -> str:
    """Write plain data as YAML text that ``load`` reads back equal, keys in their order."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False)


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: list[Any] = []
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key.value}' stands here twice; keep one of them",
                    problem_mark=key.start_mark,
                )
            seen.append(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    pass


_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in rules if tag not in (_INT, _FLOAT)]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _dialect in (_Loader, _Dumper):  # the dumper keeps the usual rules too, so it quotes for both
    _dialect.add_implicit_resolver(_INT, _INT_TEXT, list("-+0123456789"))
    _dialect.add_implicit_resolver(_FLOAT, _FLOAT_TEXT, list("-+0123456789."))
