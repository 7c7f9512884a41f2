"""A reader of YAML files, which hold configurations and lists of sources."""

from itertools import accumulate
from typing import Any

import yaml

from hf_embed.entry import shipped
from hf_embed.errors import InputError
from hf_embed.read_files import MOST_LEVELS, first_line, read_text

# Limits that no real configuration reaches. Values are counted after each alias is replaced by the value it stands for.
MOST_CHARACTERS, MOST_VALUES = 1_000_000, 100_000


class UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys. PyYAML alone silently keeps the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct a mapping. Raise TwiceError if two of its keys are equal."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise TwiceError(f"line {key_node.start_mark.line + 1}: the key '{key}' occurs twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


class TwiceError(yaml.YAMLError):
    """A mapping has the same key twice."""


def read_yaml(path: str, name: str) -> Any:
    """Return the content of a YAML file.

    Args:
        path: the file.
        name: the name of the file in messages.

    Raises:
        InputError: if the file is missing or is not YAML, if a key is there twice, or if the file holds more than any
            configuration does. Such a file is the wrong file, or was made to fill the memory.
    """
    text = read_text(shipped(path), name)
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{name}: it has {len(text):,} characters, more than any configuration file; give another file")
    deepest = max(accumulate((letter in "[{") - (letter in "]}") for letter in text), default=0) if text else 0
    if deepest > MOST_LEVELS:  # PyYAML would need minutes for such a file
        raise InputError(f"{name}: not YAML: lists and mappings are nested in more than {MOST_LEVELS} levels")
    try:
        loader = UniqueKeys(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if count_values(node, {}) > MOST_VALUES:
            raise InputError(
                f"{name}: its aliases expand to more than {MOST_VALUES:,} values; write the values without aliases"
            )
        return loader.construct_document(node)
    except InputError:
        raise
    except TwiceError as error:
        raise InputError(f"{name}, {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{name}: not YAML: {error}") from error
    except RecursionError as error:
        raise InputError(f"{name}: not YAML: lists and mappings are nested in too many levels") from error
    except Exception as error:  # PyYAML does not catch the errors of invalid dates, numbers and tags
        raise InputError(
            f"{name}: a value does not match its format or its tag ({first_line(error)}); put texts in quotes"
        ) from error


def count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """Return how many values a node holds. Each alias counts as the value that it stands for.

    Args:
        node: a node of the document.
        known: the counts of the nodes that were visited before, by the id of the node.

    Raises:
        yaml.YAMLError: if a node contains itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: an alias refers to a node that contains it")
        return known[id(node)]
    known[id(node)] = 0  # 0 marks a node that is still being counted
    inside = node.value if isinstance(node, yaml.CollectionNode) else []
    parts = [part for item in inside for part in (item if isinstance(item, tuple) else (item,))]
    known[id(node)] = 1 + sum(count_values(part, known) for part in parts)
    return known[id(node)]
