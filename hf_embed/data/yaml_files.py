"""A reader of YAML files, which hold configurations and lists of sources."""

from typing import Any

import yaml

from hf_embed.entry import shipped
from hf_embed.errors import InputError, first_line
from hf_embed.files.read_files import read_text

MOST_CHARACTERS = 1_000_000  # PyYAML needs minutes for a file of data that was given in place of a configuration


class UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses duplicate keys. PyYAML alone silently keeps the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Construct a mapping. Raise InputError if two of its keys are equal."""
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise InputError(f"line {key_node.start_mark.line + 1}: the key '{key}' occurs twice; keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: str, name: str) -> Any:
    """Return the content of a YAML file.

    Args:
        path: the file.
        name: the name of the file in messages.

    Raises:
        InputError: if the file is missing or is not YAML, if a key is there twice, or if the file is longer than any
            configuration.
    """
    text = read_text(shipped(path), name)
    if len(text) > MOST_CHARACTERS:
        raise InputError(f"{name}: it has {len(text):,} characters, more than any configuration file; give another file")
    try:
        return yaml.load(text, UniqueKeys)
    except InputError as error:
        raise InputError(f"{name}, {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{name}: not YAML: {error}") from error
    except Exception as error:  # PyYAML does not catch the errors of invalid dates, numbers and tags
        raise InputError(
            f"{name}: a value does not match its format or its tag ({first_line(error)}); put texts in quotes"
        ) from error
