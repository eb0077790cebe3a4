from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from . import options


@click.group("recipes")
def command() -> None:
    """List, show, check or begin recipes."""


@command.command("list")
@options.JSON
def list_(as_json) -> None:
    """The recipes that come with the package."""
    from ..recipe import load_recipe, recipe_names

    found = [load_recipe(name) for name in recipe_names()]
    rows = {r.name: {"questions": len(r.questions), "controls": len(r.controls), "text": r.description} for r in found}
    options.show(
        rows,
        as_json,
        [f"{n}: {r['questions']} questions, {r['controls']} controls. {r['text']}" for n, r in rows.items()],
    )


@command.command()
@click.argument("recipe")
@click.option("--questions", type=int, help="Only the first ones; of pairs, the first units.")
@options.JSON
def show(recipe, questions, as_json) -> None:
    """Every question of a recipe as it is asked, with its right answer; of pairs (pairs/en/gender) every sentence."""
    from ..recipe import load_recipe
    from . import pairs

    if pairs.is_pairs(recipe):
        return pairs.show(recipe, questions, as_json)
    found = load_recipe(recipe)
    asked = found.ask(questions if questions is not None else len(found.questions))
    lines = [f"{'control' if q.control else q.dimension}\t{q.form}\t{q.answer}\t{q.text}" for q in asked]
    options.show({"name": found.name, "questions": [asdict(q) for q in asked]}, as_json, lines)


@command.command()
@click.argument("recipe")
@click.option("--data", type=click.Path(path_type=Path), help="For pairs: folder of benchmarks, to count the overlap.")
@options.JSON
def check(recipe, data, as_json) -> None:
    """Report every fault of a recipe at once, or of pairs: pairs, pairs/en, pairs/en/gender, or a file of them."""
    from ..recipe import load_recipe
    from . import pairs

    if pairs.is_pairs(recipe):
        return pairs.check(recipe, data, as_json)
    found = load_recipe(recipe)
    counts = {"questions": len(found.questions), "controls": len(found.controls)}
    line = f"{recipe}: in order ({counts['questions']} questions, {counts['controls']} controls)"
    options.show({"name": found.name, **counts}, as_json, [line])


@command.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="File to write.  [default: NAME.yaml]")
def new(name, out) -> None:
    """Write an annotated skeleton of a recipe: in order as it stands, to be changed to your subject."""
    from ..recipe import new_recipe

    out = out or Path(f"{name}.yaml")
    new_recipe(name, out)
    click.echo(f"written: {out}\nnext: {options.shell('kbne-edit', 'recipes', 'check', out)}")
