"""Merges one config tree into another, for variants and `--set`."""

from collections.abc import Mapping, Sequence

from arraytp.config.document import KeyPath, Tree, dotted
from arraytp.errors import UserError


def overlay(base: Mapping[str, Tree], over: Mapping[str, Tree]) -> dict[str, Tree]:
    """Return `base` with the keys of `over` merged in; neither is changed."""
    return {**base, **{key: merge(base[key], value) if key in base else value for key, value in over.items()}}


def merge(base: Tree, over: Tree) -> Tree:
    """Merge maps recursively; any other value, and a map that makes another choice, replaces `base`.

    An optimiser of another `name`, a block of another `type`, or `blocks` where the base has a `name`, starts afresh,
    since settings for the old choice mean nothing to the new one.
    """
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    old, new = _choice(base), _choice(over)
    if old is not None and new is not None and old != new:
        return over
    return overlay(base, over)


def _choice(tree: Mapping[str, Tree]) -> Tree:
    """Return the choice that a map makes by `name`, `type` or `blocks`; None if it makes none."""
    for key in ("name", "type"):
        if tree.get(key) is not None:
            return (key, tree[key])
    return "blocks" if tree.get("blocks") is not None else None


def assign(tree: Mapping[str, Tree], path: KeyPath, value: Tree) -> dict[str, Tree]:
    """Return `tree` with `value` merged in at a key path; UserError if the path names a list entry that is missing."""
    key = str(path[0])
    return {**tree, key: _assigned(tree.get(key), path, 1, value)}


def _assigned(tree: Tree, path: KeyPath, depth: int, value: Tree) -> Tree:
    """Return the subtree at `path[:depth]` with `value` merged in at `path`."""
    if depth == len(path):
        return merge(tree, value)
    if isinstance(tree, list | tuple):
        index = _index(tree, path, depth)
        return [*tree[:index], _assigned(tree[index], path, depth + 1, value), *tree[index + 1 :]]
    key = str(path[depth])
    base = tree if isinstance(tree, Mapping) else {}
    return merge(base, {key: _assigned(base.get(key), path, depth + 1, value)})


def _index(entries: Sequence[Tree], path: KeyPath, depth: int) -> int:
    step = str(path[depth])
    if step.isdecimal() and len(step) < 10 and int(step) < len(entries):
        return int(step)
    held = f"has the entries 0 to {len(entries) - 1}" if entries else "is an empty list"
    raise UserError(f"{dotted(path[:depth])} {held}; {step} is none of them")
