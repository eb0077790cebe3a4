"""What `recipes check` finds: shortcuts against plain counting, and a note for each thing that is out of balance."""

from collections import Counter

import pytest
from click.testing import CliRunner
from printed import parsed

from kbne_edit import load_recipe
from kbne_edit.commands.recipes import command
from kbne_edit.recipe import check_recipe, recipe_names

EVEN = """
kbne_recipe: 1
name: t
prompt: {plain: "{question}"}
answers: ["yes", "no"]
subsets: [4]
questions:
  forms:
    f: {text: "Do {a} {act} as {b} do?", answer: "no"}
    g: {text: "Do {a} {act} beside {b} there?", answer: "yes"}  # of questions
  dimensions:
    x: {pairs: [[cats, dogs], [dogs, cats]]}
    y: {pairs: [[hens, geese], [geese, hens]]}
  concepts: {c: {act: swim}, d: {act: sing}}
controls:
  forms:
    f: {text: "Do {a} {act} as {b} do?", answer: "no"}
    g: {text: "Do {a} {act} beside {b} there?", answer: "yes"}
  dimensions: {z: {pairs: [[boats, carts], [carts, boats]]}}
  concepts: {c: {act: sink}, d: {act: stop}}  # of controls
probes:
  items:
    - {dimension: x, groups: [cats, dogs], first: "Two {group} ate.", second: "Two {group} slept."}
    - {dimension: x, groups: [cats, dogs], first: "Two {group} ran.", second: "Two {group} sat."}
    - {dimension: x, groups: [cats, dogs], first: "Two {group} hid.", second: "Two {group} came."}
    - {dimension: y, groups: [hens, geese], first: "Two {group} ate.", second: "Two {group} slept."}
    - {dimension: y, groups: [hens, geese], first: "Two {group} ran.", second: "Two {group} sat."}
    - {dimension: y, groups: [hens, geese], first: "Two {group} hid.", second: "Two {group} came."}
"""


def _check(tmp_path, old="", new=""):
    assert not old or EVEN.count(old) == 1
    (tmp_path / "r.yaml").write_text(EVEN.replace(old, new) if old else EVEN)
    return check_recipe(load_recipe(tmp_path / "r.yaml"))


def test_an_even_recipe_has_nothing_to_note(tmp_path):
    result = _check(tmp_path)
    assert result.notes == () and result.uneven_subsets == result.uneven_groups == ()
    assert result.questions.always == result.controls.always == {"yes": 0.5, "no": 0.5}
    assert result.questions.count == 8 and result.controls.count == 4 and result.twins == {"x": 3, "y": 3}
    assert result.questions.opening == result.controls.opening == 0.5
    assert [length.ratio for length in result.lengths] == [1, 1]


@pytest.mark.parametrize(
    "old, new, note",
    [
        ('answer: "yes"}  # of questions', 'answer: "no"}', 'always "no" is right in 100.0% of the questions'),
        (
            '"Do {a} {act} beside {b} there?", answer: "yes"}  # of',
            '"May {a} {act}, {b}?", answer: "yes"}  # of',
            "100.0%",
        ),
        ("[[boats, carts],", "[[big boats, small and old carts],", "controls of form f are 1.33 times as long"),
        ("[[hens, geese], [geese, hens]]", "[[hens, geese]]", "hens (y) is 2 times a and 0 times b"),
        ("subsets: [4]", "subsets: [3]", "subset 3 is not balanced"),
        ("subsets: [4]", "subsets: [6]", "subset 6 is not balanced"),
        (
            'y, groups: [hens, geese], first: "Two {group} hid',
            'w, groups: [a, b], first: "Two {group} hid',
            "twins of w",
        ),
        (
            '    - {dimension: x, groups: [cats, dogs], first: "Two {group} hid.", second: "Two {group} came."}\n',
            "",
            "5 twins",
        ),
        (
            "probes:\n  items:",
            'probes:\n  items:\n    - {dimension: y, stereotype: "A cat.", anti_stereotype: "A dog."}',
            "1 twins do not mirror",
        ),
        (
            "d: {act: stop}}  # of controls",
            'd: {act: stop}}\n  items: [{text: "Is it?", answer: "yes", form: f, dimension: z}]',
            'controls of form f with the answer "yes" match no question',
        ),
        ('    g: {text: "Do {a} {act} beside {b} there?", answer: "yes"}\n', "", "form g has no controls"),
    ],
)
def test_what_is_out_of_balance_is_noted(tmp_path, old, new, note):
    result = _check(tmp_path, old, new)
    assert [text for text in result.notes if note in text], result.notes


def test_a_dimension_without_twins_and_a_recipe_without_controls_are_noted(tmp_path):
    (tmp_path / "r.yaml").write_text(EVEN.replace("{dimension: y, groups", "{dimension: x, groups"))
    assert "dimension y has no twins" in check_recipe(load_recipe(tmp_path / "r.yaml")).notes
    text = EVEN.partition("controls:")[0] + "probes:" + EVEN.partition("probes:")[2]
    (tmp_path / "r.yaml").write_text(text)
    result = check_recipe(load_recipe(tmp_path / "r.yaml"))
    assert result.controls.count == 0 and "there are no controls" in result.notes[0] and len(result.notes) == 1


@pytest.mark.parametrize("name", recipe_names())
def test_shortcuts_are_what_plain_counting_finds(name):
    recipe = load_recipe(name)
    result = check_recipe(recipe)
    for side, shares in ((recipe.questions, result.questions), (recipe.controls, result.controls)):
        for answer in recipe.answers:
            assert shares.always[answer] == sum(q.answer == answer for q in side) / len(side)
        best = 0.0
        for length in (1, 2, 3):
            right = 0.0
            for question in side:  # what the other questions with this opening are answered, most of them and itself
                opening = question.text[:length] if recipe.language == "zh" else question.text.split()[:length]
                alike = [
                    q.answer
                    for q in side
                    if (q.text[:length] if recipe.language == "zh" else q.text.split()[:length]) == opening
                ]
                if len(alike) == 1:
                    right += 1 / len(recipe.answers)
                else:
                    right += max(Counter(alike).values()) / len(alike)
            best = max(best, right / len(side))
        assert shares.opening == pytest.approx(best)


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - {"demo"}))
def test_the_recipes_that_come_along_have_nothing_to_note(name):
    assert check_recipe(load_recipe(name)).notes == ()


def test_the_command_prints_the_figures():
    run = CliRunner().invoke(command, ["check", "demo"])
    assert run.exit_code == 0 and run.output.startswith("demo: in order (45 questions, 45 controls, 36 twins)")
    assert "66.7%" in run.output and 'note: always "yes" is right in 66.7% of the questions' in run.output
    run = CliRunner().invoke(command, ["check", "hiring"])
    assert run.output.rstrip().endswith("nothing to note") and run.output.count("50.0%") == 6
    run = CliRunner().invoke(command, ["check", "hiring", "--json"])
    assert parsed("recipes-check", run.output)["questions"] == {
        "count": 192,
        "always": {"yes": 0.5, "no": 0.5},
        "opening": 0.5,
    }


def test_the_list_counts_what_each_recipe_holds():
    run = CliRunner().invoke(command, ["list", "--json"])
    rows = parsed("recipes-list", run.output)["recipes"]
    assert set(rows) == set(recipe_names())
    for name, row in rows.items():
        recipe = load_recipe(name)
        held = (len(recipe.questions), len(recipe.controls), len(recipe.twins), recipe.language)
        assert (row["questions"], row["controls"], row["twins"], row["language"]) == held
    shown = CliRunner().invoke(command, ["show", "demo", "--questions", "9", "--json"]).output
    assert len(parsed("recipes-show", shown)["questions"]) >= 9
    lines = CliRunner().invoke(command, ["list"]).output.splitlines()
    assert [line.partition(":")[0] for line in lines] == recipe_names()
    assert "hiring: 192 questions, 96 controls, 32 twins." in lines[recipe_names().index("hiring")]
