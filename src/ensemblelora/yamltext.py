"""YAML from strangers: plain values or one line that says what is wrong, within bounds of time and memory.

In: text. Out: what ``yaml.safe_load`` gives. Aliases are counted as often as they are repeated before anything is made
of them, so that a few lines which stand for millions of values are refused and not carried out.
"""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["YamlError", "parse_yaml"]

_MOST_CHARACTERS = 2**20
_MOST_VALUES = 100_000
_UNUSUAL = frozenset(f"tag:yaml.org,2002:{kind}" for kind in ("binary", "omap", "pairs", "set"))
"""what no recipe or card needs; a set has no order"""


class YamlError(ValueError):
    """Text that is no YAML, or none that may be read; the message is one line, without the file's name."""


def parse_yaml(text: str) -> Any:
    """Read one document.

    Raises:
        YamlError: If the text is not valid, calls functions, holds a key twice, half of a character, or too much.

    Example:
        >>> parse_yaml("a: [1, yes]")
        {'a': [1, True]}
    """
    if len(text) > _MOST_CHARACTERS:
        raise YamlError(f"{len(text):,} characters, at most {_MOST_CHARACTERS:,} are read; leave data to data files")
    loader = yaml.SafeLoader("")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if (n_values := _count(node, {}, set())) > _MOST_VALUES:
            raise YamlError(f"stands for {n_values:,} values, at most {_MOST_VALUES:,} are read; write fewer aliases")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise YamlError(" ".join(str(error).split())) from None
    except RecursionError:
        raise YamlError("nested too deeply; write it flatter") from None
    except YamlError:
        raise
    except (ValueError, TypeError, OverflowError, AttributeError) as error:  # numbers, dates and keys that are none
        raise YamlError(f"a value can't be read ({' '.join(str(error).split())})") from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], opened: set[int]) -> int:
    """Values that a node stands for, aliases as often as they are repeated."""
    if id(node) in opened:
        raise YamlError(f"an alias leads back to itself (line {node.start_mark.line + 1})")
    if node.tag in _UNUSUAL:
        raise YamlError(f"{node.tag.rpartition(':')[2]} (line {node.start_mark.line + 1}): write a list or plain text")
    if id(node) not in known:
        opened.add(id(node))
        known[id(node)] = 1 + sum(_count(child, known, opened) for child in _list_children(node))
        opened.discard(id(node))
    return known[id(node)]


def _list_children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        return [part for pair in node.value for part in pair]
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if any(character == "\0" or "\ud800" <= character <= "\udfff" for character in node.value):
        raise YamlError(f"holds a zero byte or half of a character (line {node.start_mark.line + 1})")
    return []


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
            continue
        if (key.tag, key.value) in seen:
            raise YamlError(f"key {key.value!r} is there twice (line {key.start_mark.line + 1})")
        seen.add((key.tag, key.value))
