"""Configurations and lists of sources: YAML files."""

from typing import Any

import yaml

from hf_embed.entry import shipped
from hf_embed.errors import InputError
from hf_embed.read_files import read_text


class UniqueKeys(yaml.SafeLoader):
    """YAML in which no key stands twice; of two, PyYAML takes the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct a mapping, whose keys differ."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise TwiceError(f"line {key_node.start_mark.line + 1}: the key '{key}' is there twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


class TwiceError(yaml.YAMLError):
    """A key is there twice."""


def read_yaml(path: str, name: str) -> Any:
    """Return what a YAML file holds.

    Raises:
        InputError: the file, which the message calls `name`, is missing or not YAML, or has a key twice.
    """
    text = read_text(shipped(path), name)
    try:
        return yaml.load(text, UniqueKeys)
    except TwiceError as error:
        raise InputError(f"{name}, {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{name}: not YAML: {' '.join(str(error).split())}") from error
