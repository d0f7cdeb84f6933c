"""Reads YAML 1.2 text into plain maps, lists and scalars, with the place of every key."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from ruamel.yaml.reader import ReaderError

from arraytp.disk import read_small
from arraytp.errors import UserError

KeyPath = tuple[str | int, ...]
Tree = Any

_CORE = "tag:yaml.org,2002:"
_MAXIMUM_DEPTH = 50
# With aliases of aliases, a short text can expand to more entries than memory holds.
_MOST_ENTRIES = 100_000
# Aliases can repeat one long text, too.
_MOST_CHARACTERS = 2**22
_MOST_BYTES = 2**20


@dataclass(frozen=True)
class Document:
    """The content of a config text: plain values, and the place of each key or list entry, as messages print it."""

    tree: Tree
    places: Mapping[KeyPath, str]
    source: str


def dotted(path: KeyPath) -> str:
    """Write a key path as `--set` takes it: `network.blocks.0.kernel`."""
    return ".".join(map(str, path))


def encodable(text: str) -> bool:
    """Tell whether text can be written as UTF-8, as file names and arguments sometimes cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_document(path: str | Path) -> Document:
    """Read a YAML file; UserError, with file and line, unless it is one YAML document in UTF-8."""
    try:
        content = read_small(Path(path), _MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give a config file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x})") from None
    return parse_text(text, str(path), lambda line: f"{path}:{line}")


def parse_text(text: str, source: str, place: Callable[[int], str]) -> Document:
    """Parse one YAML 1.2 document.

    In messages, `source` names the whole text, and `place` turns a line's number, from 1, into the line's name.
    UserError if the text is not valid YAML, holds a key twice or has a tag that configs do not use.
    """
    places: dict[KeyPath, str] = {}
    for number, content in enumerate(text.splitlines(), 1):
        if content.startswith("%YAML") and content.split()[1:2] != ["1.2"]:
            raise UserError(f"{place(number)}: {content[:20].strip()}: a config is YAML 1.2; leave this line out")
        if content and content[0] not in "%#":
            break
    try:
        node = YAML(typ="safe", pure=True).compose(text)
        tree = None if node is None else _Reader(place, places).value(node, ())
    except MarkedYAMLError as error:
        raise UserError(_syntax_message(error, place)) from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        character = f"U+{error.character:04X}"
        raise UserError(f"{place(line)}: not valid YAML: the character {character} must not appear") from None
    except RecursionError:
        raise UserError(f"{source}: nested too deeply") from None
    except (ValueError, OverflowError) as error:
        # For example an escape for a character beyond the last code point.
        raise UserError(f"{source}: not valid YAML: {error}") from None
    return Document(tree, places, source)


def _syntax_message(error: MarkedYAMLError, place: Callable[[int], str]) -> str:
    """Say in one line what the parser stumbled over and where."""
    mark, begun = error.problem_mark or error.context_mark, error.context_mark
    where = place(mark.line + 1) if mark is not None else place(1)
    what = str(error.problem or "cannot be parsed")
    if "another document" in what:
        return f"{where}: a second document starts here; a config is one document"
    if "'\\t'" in what:
        return f"{where}: not valid YAML: a tab where YAML wants spaces; use spaces"
    what = what.replace("'<stream end>'", "the end").replace("of stream", "of the text")
    if begun is not None and mark is not None and begun.line != mark.line:
        what += f" {error.context}, begun at {place(begun.line + 1)}"
    return f"{where}: not valid YAML: {what}"


class _Reader:
    """Turns composed nodes into values and notes their places."""

    def __init__(self, place: Callable[[int], str], places: dict[KeyPath, str]) -> None:
        self._place = place
        self._places = places
        self._scalars = YAML(typ="safe", pure=True).constructor
        self._characters = 0

    def value(self, node: Node, path: KeyPath) -> Tree:
        if len(path) > _MAXIMUM_DEPTH:
            raise UserError(f"{self._at(node)}: nested too deeply")
        if isinstance(node, MappingNode) and node.tag == _CORE + "map":
            return self._map(node, path)
        if isinstance(node, SequenceNode) and node.tag == _CORE + "seq":
            return [self._entry(item, item, (*path, index)) for index, item in enumerate(node.value)]
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        raise UserError(f"{self._at(node)}: the tag {_shown_tag(node)} has no meaning in a config")

    def _at(self, node: Node) -> str:
        return self._place(node.start_mark.line + 1)

    def _entry(self, where: Node, node: Node, path: KeyPath) -> Tree:
        if len(self._places) == _MOST_ENTRIES:
            raise UserError(
                f"{self._at(where)}: more than {_MOST_ENTRIES:,} keys and list entries, aliases written out; a config "
                "has fewer"
            )
        self._places[path] = self._at(where)
        return self.value(node, path)

    def _map(self, node: MappingNode, path: KeyPath) -> dict[str, Tree]:
        tree: dict[str, Tree] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise UserError(f"{self._at(key_node)}: a key must be plain text, not a list or a map")
            # Keys are read as text, so that a variant may be called 0.10 or true.
            key = str(key_node.value)
            if key in tree:
                first = self._places[*path, key]
                raise UserError(
                    f"{self._at(key_node)}: the key {dotted((*path, key))} is given twice, first at {first}"
                )
            tree[key] = self._entry(key_node, value_node, (*path, key))
        return tree

    def _scalar(self, node: ScalarNode) -> Tree:
        kind = str(node.tag).removeprefix(_CORE)
        self._characters += len(node.value)
        if self._characters > _MOST_CHARACTERS:
            raise UserError(
                f"{self._at(node)}: more than {_MOST_CHARACTERS:,} characters, aliases written out; a config has fewer"
            )
        if kind in {"str", "timestamp", "merge", "value"}:
            return str(node.value)
        if kind not in {"null", "bool", "int", "float"}:
            raise UserError(f"{self._at(node)}: the tag {_shown_tag(node)} has no meaning in a config")
        if "_" in node.value:
            # A number to the parser, but text in YAML 1.2.
            return str(node.value)
        try:
            return self._scalars.construct_object(node)
        except (ValueError, LookupError):
            raise UserError(f"{self._at(node)}: {node.value!r} cannot be read as {_shown_tag(node)}") from None


def _shown_tag(node: Node) -> str:
    return str(node.tag).replace(_CORE, "!!")
