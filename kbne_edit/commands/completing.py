"""What a shell offers after Tab: recipe names, tasks, parts of a verdict, and the demo beside folders."""

from __future__ import annotations

from collections.abc import Iterable

import click
from click.shell_completion import CompletionItem


def model(context: click.Context, param: click.Parameter, word: str) -> list[CompletionItem]:
    """The demo, and folders."""
    return [*_starting(["demo"], word), CompletionItem(word, type="dir")]


def recipe(context: click.Context, param: click.Parameter, word: str) -> list[CompletionItem]:
    """Recipes of the package, and files."""
    from ..recipe import recipe_names

    return [*_starting(recipe_names(), word), CompletionItem(word, type="file")]


def tasks(context: click.Context, param: click.Parameter, word: str) -> list[CompletionItem]:
    """Tasks, after those that are typed already."""
    from ..evaluation.tasks import GROUPS, TASKS

    return _listed([*TASKS, *GROUPS], word)


def parts(context: click.Context, param: click.Parameter, word: str) -> list[CompletionItem]:
    """Parts of a verdict, after those that are typed already."""
    from ..evaluation.verdict import PARTS

    return _listed(PARTS, word)


def _starting(names: Iterable[str], word: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(word)]


def _listed(names: Iterable[str], word: str) -> list[CompletionItem]:
    """The last name of a list with commas."""
    typed, comma, last = word.rpartition(",")
    known = typed.split(",")
    return [CompletionItem(f"{typed}{comma}{name}") for name in names if name.startswith(last) and name not in known]
