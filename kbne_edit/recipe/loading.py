"""Loads recipes: those of the package by name, others by path."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

from ..errors import InputError, OutputError, RecipeError, shown
from ..yamlfile import read_yaml
from .types import Recipe

_PACKAGE = Path(__file__).parent.parent


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in _folder().glob("*.yaml"))


def _folder() -> Path:
    """The folder of recipes: inside the package in a wheel, beside it in a checkout."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


def new_recipe(name: str, path: str | Path) -> None:
    """Write an annotated, valid skeleton to a new file. Raises InputError, OutputError."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"{shown(name)} is not a valid recipe name: use letters, digits, - and _")
    text = (_PACKAGE / "skeleton.yaml").read_text(encoding="utf-8")
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text.replace("NAME", name))
    except FileExistsError:
        raise OutputError(f"{path} exists: choose another --out") from None
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from None


def load_recipe(recipe: str | Path) -> Recipe:
    """A recipe by name or by path. Raises RecipeError with all faults."""
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml", ".json"):
        return _packaged(str(recipe))
    return _read(path)


@functools.lru_cache
def _packaged(name: str) -> Recipe:
    """A recipe of the package, read once per process: parsing YAML takes longer than folding a small model."""
    path = _folder() / f"{name}.yaml"
    if not path.is_file():
        raise RecipeError(f"recipe {name}", [f"no such recipe; there are: {', '.join(recipe_names())}, or a path"])
    return _read(path)


def _read(path: Path) -> Recipe:
    try:
        data, raw = read_yaml(path)
    except InputError as error:
        raise RecipeError(str(path), [str(error)]) from None
    return Recipe.from_dict(data, str(path), hashlib.sha256(raw).hexdigest())
