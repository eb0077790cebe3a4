from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import completing, options

if TYPE_CHECKING:
    from ..recipe import RecipeCheck
    from ..recipe.types import RecipeRow


@click.group("recipes")
def command() -> None:
    """List, show, check or create recipes."""


@command.command("list")
@options.JSON
def list_(as_json: bool) -> None:
    """List the recipes of the package."""
    from ..recipe import load_recipe, recipe_names

    rows: dict[str, RecipeRow] = {}
    lines = []
    for name in recipe_names():
        recipe = load_recipe(name)
        rows[name] = {
            "questions": len(recipe.questions),
            "controls": len(recipe.controls),
            "twins": len(recipe.twins),
            "language": recipe.language,
            "text": recipe.description,
        }
        lines.append(
            f"{name}: {len(recipe.questions)} questions, {len(recipe.controls)} controls, {len(recipe.twins)} twins. "
            f"{recipe.description}"
        )
    options.show({"recipes": rows}, as_json, lines)


@command.command()
@click.argument("recipe", shell_complete=completing.recipe)
@click.option("--questions", type=int, help="Show only this many questions, or units of pairs.")
@options.JSON
def show(recipe: str, questions: int | None, as_json: bool) -> None:
    """Show the questions of a recipe with their right answers, or the sentences of pairs (pairs/en/gender)."""
    from ..recipe import load_recipe
    from . import pairs

    if pairs.is_pairs(recipe):
        return pairs.show(recipe, questions, as_json)
    loaded = load_recipe(recipe)
    chosen = loaded.ask(questions if questions is not None else len(loaded.questions))
    lines = [f"{'control' if q.control else q.dimension}\t{q.form}\t{q.answer}\t{q.text}" for q in chosen]
    options.show({"name": loaded.name, "questions": [asdict(q) for q in chosen]}, as_json, lines)


@command.command()
@click.argument("recipe", shell_complete=completing.recipe)
@click.option("--data", type=click.Path(path_type=Path), help="For pairs: folder of benchmarks to compare with.")
@options.JSON
def check(recipe: str, data: Path | None, as_json: bool) -> None:
    """Report every fault of a recipe at once, and how much a model could answer without understanding.

    That is: how often a constant answer or the opening words are right, whether questions and controls are equally
    long, whether groups and subsets are balanced, and the twins of each dimension. Or checks pairs: pairs, pairs/en,
    pairs/en/gender, or a file of them.
    """
    from ..recipe import check_recipe, load_recipe
    from . import pairs

    if pairs.is_pairs(recipe):
        return pairs.check(recipe, data, as_json)
    loaded = load_recipe(recipe)
    checked = check_recipe(loaded)
    options.show(checked.to_dict(), as_json, _check_lines(recipe, checked))


def _check_lines(source: str, checked: RecipeCheck) -> list[str]:
    """The result of a check, as lines: valid, its shortcuts beside chance, its lengths, its notes."""
    questions, controls = checked.questions, checked.controls
    twins = sum(checked.twins.values())
    lines = [f"{source}: in order ({questions.count} questions, {controls.count} controls, {twins} twins)"]
    rows = [(f'always "{answer}"', share, controls.always[answer]) for answer, share in questions.always.items()]
    rows.append(("by the opening words", questions.opening, controls.opening))
    lines.append(f"right without understanding   questions  controls   ({checked.chance:.0%} wanted)")
    lines += [f"  {name:<28}{one:>9.1%}{other:>10.1%}" for name, one, other in rows]
    lines.append("mean length                   questions  controls     ratio")
    for length in checked.lengths:
        row = f"  {length.form or '(no form)':<28}{length.questions:>9.1f}"
        lines.append(row + ("" if length.controls is None else f"{length.controls:>10.1f}{length.ratio:>10.2f}"))
    if checked.twins:
        lines.append("twins: " + ", ".join(f"{dimension} {count}" for dimension, count in checked.twins.items()))
    lines += [f"note: {note}" for note in checked.notes] or ["nothing to note"]
    return lines


@command.command()
@click.argument("name")
@click.option("--out", type=click.Path(path_type=Path), help="File to write.  [default: NAME.yaml]")
def new(name: str, out: Path | None) -> None:
    """Write an annotated skeleton of a recipe. It is valid as it stands; change it to your subject."""
    from ..recipe import new_recipe

    out = out or Path(f"{name}.yaml")
    new_recipe(name, out)
    click.echo(f"written: {out}\nnext: {options.shell('kbne-edit', 'recipes', 'check', out)}")
