"""The recipes that come along, and the skeleton of a new one."""

import importlib.metadata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from kbne_edit import Checks, Edit, bake, load_recipe
from kbne_edit.errors import InputError, OutputError, RecipeError
from kbne_edit.locating import Settings
from kbne_edit.recipe import Recipe, new_recipe, recipe_names
from kbne_edit.recipe.parsing import KEYS

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "kbne_edit" / "demo"
VARIANTS = {  # of the head of social-bias: {name: (language, answers)}
    "es": ("es", ["sí", "no"]),
    "fr": ("fr", ["oui", "non"]),
    "de": ("de", ["ja", "nein"]),
    "zh": ("zh", ["是", "否"]),
    "reworded": ("en", ["yes", "no"]),
    "true-false": ("en", ["true", "false"]),
}


OLDER = {"demo"}  # its small world knows no other wording


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_balanced_and_its_controls_match(name):
    recipe = load_recipe(name)
    questions, controls = recipe.questions, recipe.controls
    assert recipe.name == name and len(questions) >= 27 and len(controls) >= 18
    texts = Counter(" ".join(q.text.casefold().split()) for q in recipe.ask(len(questions)))
    assert [text for text, count in texts.items() if count > 1] == []
    for count in (*recipe.subsets, len(questions)):
        requests = recipe.ask(count)
        kinds = [Counter((q.form, q.answer) for q in requests if q.control == control) for control in (False, True)]
        shares = [{kind: n / sum(result.values()) for kind, n in result.items()} for result in kinds]
        assert shares[0] == pytest.approx(shares[1]) and {answer for _, answer in shares[0]} == set(recipe.answers)
        among = Counter(q.answer for q in requests)
        if name in OLDER:
            assert min(among.values()) >= len(requests) / 3  # no answer is right nearly everywhere
        else:
            assert len(set(among.values())) == 1
        assert len(set(Counter(q.dimension for q in requests if not q.control).values())) == 1
    assert not {q.dimension for q in questions} & {q.dimension for q in controls}
    assert recipe.ask(None)  # the default number of questions is one of its sizes


def _words(recipe, text):
    return list(text) if recipe.language == "zh" else text.split()


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - OLDER))
def test_neither_an_answer_nor_the_opening_words_give_a_question_away(name):
    _gives_nothing_away(load_recipe(name))


def _gives_nothing_away(recipe):
    for count in (*recipe.subsets, len(recipe.questions)):
        requests = recipe.ask(count)
        for side in ([q for q in requests if not q.control], [q for q in requests if q.control]):
            for length in (1, 2, 3):
                answers = {}
                for question in side:
                    opening = tuple(_words(recipe, question.text)[:length])
                    answers.setdefault(opening, []).append(question.answer)
                right = sum(max(Counter(given).values()) for given in answers.values())
                assert right == len(side) / 2, (length, right, len(side))


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - OLDER))
def test_controls_are_as_long_as_the_questions(name):
    recipe = load_recipe(name)
    for form in {q.form for q in recipe.questions}:
        ours, theirs = (
            np.mean([len(_words(recipe, q.text)) for q in side if q.form == form])
            for side in (recipe.questions, recipe.controls)
        )
        assert 0.85 <= theirs / ours <= 1.15, (form, ours, theirs)


@pytest.mark.parametrize("name", sorted(set(recipe_names()) - OLDER))
def test_every_group_is_as_often_the_first_as_the_second(name):
    recipe = load_recipe(name)
    if not recipe.pairings or recipe.aim != "balance" or any(q.twin for q in recipe.questions):
        pytest.skip("a and b are no groups")
    for dimension in {q.dimension for q in recipe.questions}:
        sides = [Counter(getattr(p, side) for p in recipe.pairings if p.dimension == dimension) for side in "ab"]
        assert sides[0] == sides[1], dimension


@pytest.mark.parametrize("name", [n for n in recipe_names() if any(q.twin for q in load_recipe(n).questions)])
def test_a_twin_differs_in_one_word(name):
    recipe = load_recipe(name)
    for question in recipe.questions:
        one, other = question.text.split(), question.twin.split()
        assert len(one) == len(other) and sum(a != b for a, b in zip(one, other, strict=True)) == 1
    requests, count = recipe.ask(24), 24
    twins = requests[count : 2 * count]
    assert [(t.text, t.answer, t.form, t.dimension) for t in twins] == [
        (q.twin, q.answer, q.form, q.dimension) for q in requests[:count]
    ]
    assert all(t.control and not t.twin for t in twins) and requests[2 * count :] == recipe.controls[:count]
    words = [[set(text.split()) for text in (q.text, q.twin)] for q in recipe.questions]
    groups, others = ({word for pair in words for word in pair[i] - pair[1 - i]} for i in (0, 1))
    assert not groups & others


FEWEST_TWINS = {"social-bias": 60} | {f"social-bias-{language}": 36 for language in ("de", "es", "fr", "zh")}


@pytest.mark.parametrize("name", recipe_names())
def test_probes_are_twins_of_the_recipes_dimensions(name):
    recipe = load_recipe(name)
    assert len(recipe.twins) >= FEWEST_TWINS.get(name, 24) and all(twin.mirrored for twin in recipe.twins)
    counts = Counter(twin.dimension for twin in recipe.twins)
    assert set(counts) == {q.dimension for q in recipe.questions} and len(set(counts.values())) == 1
    sentences = [text for probe in recipe.probes for text in (probe.first, probe.second)]
    assert len(set(sentences)) == len(sentences)
    assert all(text[-1] in ".!?。" and "  " not in text and text.count(" .") == (name == "demo") for text in sentences)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_asks_what_the_original_asks(name):
    variant, original = load_recipe(f"social-bias-{name}"), load_recipe("social-bias")
    assert (variant.language, list(variant.answers)) == VARIANTS[name]
    sides = [(variant.questions[:48], original.questions[:48]), (variant.controls[:48], original.controls[:48])]
    for got, want in sides:
        assert [(q.form, q.dimension) for q in got] == [(q.form, q.dimension) for q in want]
        same = dict(zip(original.answers, variant.answers, strict=True))
        assert [q.answer for q in got] == [same[q.answer] for q in want]
        assert not {q.text for q in got} & {q.text for q in want}


def test_an_installation_holds_every_recipe():
    try:
        files = {path.as_posix() for path in importlib.metadata.distribution("kbne-edit").files}
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed: the checkout itself is tested")
    names = {f"kbne_edit/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert names | {"kbne_edit/skeleton.yaml"} <= files


# ---------------------------------------------------------------------------------------------------------------- aim


def _demo_with(tmp_path, probes):
    text = (ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "r.yaml").write_text(text.partition("\nprobes:")[0] + "\n" + probes, encoding="utf-8")
    return tmp_path / "r.yaml"


UNWANTED = """probes:
  aim: avoid
  items:
    - {unwanted: "the zorn is a healer .", wanted: "the velm is a healer .", dimension: clan}
    - {unwanted: "the zorn is a leader .", wanted: "the velm is a leader .", dimension: clan}
    - {unwanted: "a zorn heals better than most .", wanted: "a velm heals better than most .", dimension: clan}
    - {unwanted: "a zorn leads better than most .", wanted: "a velm leads better than most .", dimension: clan}
    - {unwanted: "a zorn bakes better than most .", wanted: "a velm bakes better than most .", dimension: clan}
    - {unwanted: "a zorn hunts better than most .", wanted: "a velm hunts better than most .", dimension: clan}
"""


def test_the_card_names_what_is_to_be_avoided(tmp_path):
    path = _demo_with(tmp_path, UNWANTED)
    result = bake(
        "demo",
        tmp_path / "out",
        Settings(recipe=path),
        edit=Edit("down", {1: {5: 2.0}}),
        checks=Checks(behaviour=False),
    )
    card, effect = (tmp_path / "out" / "README.md").read_text(encoding="utf-8"), result.impact.effect
    assert "how much more probable the unwanted one is" in card and "stereotype" not in card
    assert effect.avoids and effect.change == effect.change_signed
    mean, low, high = effect.change_signed
    assert f"| this edit | {mean:+.4f} | {low:+.4f} to {high:+.4f} |" in card
    assert f"**{result.verdict.ship}**" in card


def test_too_few_probes_are_no_measurement(tmp_path, caplog):
    """Six pairs of one sign are the fewest that a two-sided test of 5 % can tell from chance."""
    from scipy.stats import binomtest

    caplog.set_level("INFO", "kbne_edit")
    assert binomtest(6, 6).pvalue < 0.05 < binomtest(5, 5).pvalue
    edit, few = Edit("down", {1: {5: 2.0}}), UNWANTED.rpartition("\n    -")[0] + "\n"
    with caplog.at_level("INFO", "kbne_edit"):
        result = bake(
            "demo",
            tmp_path / "out",
            Settings(recipe=_demo_with(tmp_path, few)),
            edit=edit,
            checks=Checks(behaviour=False),
        )
    assert result.impact.effect is None and result.verdict.effect.state == "NOT MEASURED"
    assert "5 different twins cannot tell an effect from chance" in caplog.text
    assert "it was not measured" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_faults_of_probes_are_named(tmp_path):
    probes = "probes: {aim: [x], items: [{unwanted: a, wanted: b, dimension: c}]}\n"
    with pytest.raises(RecipeError) as error:
        load_recipe(_demo_with(tmp_path, probes))
    assert "probes.aim is ['x']" in str(error.value) and "needs exactly stereotype" in str(error.value)


# -------------------------------------------------------------------------------------------------------------- twins


TWINS = """
kbne_recipe: 1
name: t
prompt: {plain: "{question}"}
answers: ["yes", "no"]
questions:
  forms: {f: {text: "Does being {a} make one lazy?", twin: "Does being {b} make one lazy?", answer: "no"}}
  dimensions: {d: {pairs: [[left-handed, upstairs]]}}
  concepts: {c: {}}
  items:
    - {text: "Is it so?", twin: "Is it not?", answer: "yes", dimension: d}
    - {text: "Is it?", answer: "no", dimension: d}
controls: {items: [{text: "Is ice cold?", answer: "yes", dimension: nature}]}
"""


def test_twins_of_forms_and_of_items(tmp_path):
    (tmp_path / "r.yaml").write_text(TWINS)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert [q.twin for q in recipe.questions] == ["Does being upstairs make one lazy?", "Is it not?", ""]
    assert [(q.text, q.answer) for q in recipe.ask(3) if q.control] == [
        ("Does being upstairs make one lazy?", "no"),
        ("Is it not?", "yes"),
        ("Is ice cold?", "yes"),
    ]


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ('twin: "Is it not?"', "twin: 3", "questions 2: twin must be text"),
        ('twin: "Is it not?"', 'twin: "Is ice cold?"', "question appears twice"),
        ('twin: "Is it not?"', 'twin: "Is it so?"', "question appears twice"),
        ("{b} make", "{z} make", "no value for {z}"),
        ('twin: "Does', 'twn: "Does', "unknown key"),
        ('cold?",', 'cold?", twin: "Is it warm?",', "a control cannot have a twin"),
    ],
)
def test_faults_of_twins_are_named(tmp_path, old, new, fault):
    assert TWINS.count(old) == 1
    (tmp_path / "r.yaml").write_text(TWINS.replace(old, new))
    with pytest.raises(RecipeError, match=fault):
        load_recipe(tmp_path / "r.yaml")


# -------------------------------------------------------------------------------------------------------------- order


ORDER = """
kbne_recipe: 1
name: t
prompt: {plain: "{question}"}
answers: ["yes", "no"]
subsets: [2, 4]
questions:
  forms: {f: {text: "Do {a} {act} as {b} do?", answer: "no"}, g: {text: "May {a} {act}, {b}?", answer: "yes"}}
  dimensions: {x: {pairs: [[x1, x2], [x3, x4]]}, y: {pairs: [[y1, y2]]}}
  concepts: {c: {act: swim}, d: {act: sing}, e: {act: run}}
  order:
    - {concepts: [d, e], dimensions: [x]}
    - {concepts: [c, d], dimensions: [y]}
"""


def test_a_grid_is_asked_in_its_order(tmp_path):
    (tmp_path / "r.yaml").write_text(ORDER)
    recipe = load_recipe(tmp_path / "r.yaml")
    assert [q.text for q in recipe.questions if q.form == "f"] == [
        "Do x1 sing as x2 do?",
        "Do x3 run as x4 do?",
        "Do y1 swim as y2 do?",
        "Do y1 sing as y2 do?",
    ]
    assert [q.dimension for q in recipe.questions] == ["x"] * 4 + ["y"] * 4
    assert recipe.ask(None) == recipe.questions and recipe.ask(4) == recipe.questions[:4]


@pytest.mark.parametrize(
    "old, new, fault",
    [
        ("concepts: [d, e]", "concepts: [d, z]", "'z' is not one of the concepts"),
        ("dimensions: [y]", "dimensions: [x]", "order leaves out 'y'"),
        ("concepts: [d, e]", "concepts: [d, d, e]", "'d' meets 'x' twice"),
        ("concepts: [d, e]", "concepts: [d, e, c, d, e, c]", "more cells than the grid"),
        ("concepts: [d, e]", "concepts: d", "must list blocks"),
        ("concepts: [d, e]", "concepts: [[d], e]", "is not one of the concepts"),
        ("{concepts: [c, d], ", "{", "must list blocks"),
    ],
)
def test_faults_of_an_order_are_named(tmp_path, old, new, fault):
    assert ORDER.count(old) == 1
    (tmp_path / "r.yaml").write_text(ORDER.replace(old, new))
    with pytest.raises(RecipeError, match=fault):
        load_recipe(tmp_path / "r.yaml")


def test_the_default_is_the_largest_size_that_keeps_a_run_short(tmp_path):
    concepts = ", ".join(f"c{i}: {{act: swim{i}}}" for i in range(30))
    text = ORDER.partition("  order:")[0].replace("c: {act: swim}", concepts).replace("[2, 4]", "[16, 48, 64]")
    (tmp_path / "r.yaml").write_text(text)
    assert len(load_recipe(tmp_path / "r.yaml").ask(None)) == 48
    (tmp_path / "r.yaml").write_text(text.replace("[16, 48, 64]", "[64, 96]"))
    assert len(load_recipe(tmp_path / "r.yaml").ask(None)) == 64


# ----------------------------------------------------------------------------------------------------------- skeleton


def test_the_skeleton_is_a_recipe_in_order(tmp_path):
    new_recipe("no", tmp_path / "r.yaml")  # a name that plain YAML takes for false
    recipe = load_recipe(tmp_path / "r.yaml")
    assert recipe.name == "no" and len(recipe.questions) == len(recipe.controls) == 12 and len(recipe.twins) == 6
    assert [(q.form, q.answer) for q in recipe.questions] == [(q.form, q.answer) for q in recipe.controls]
    _gives_nothing_away(recipe)
    assert all(twin.mirrored for twin in recipe.twins)
    text = (tmp_path / "r.yaml").read_text(encoding="utf-8")
    assert set(yaml.safe_load(text)) == KEYS  # every key of the format is shown
    assert "NAME" not in text and max(map(len, text.splitlines())) <= 120


def test_the_skeleton_overwrites_nothing(tmp_path):
    (tmp_path / "r.yaml").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        new_recipe("r", tmp_path / "r.yaml")
    assert (tmp_path / "r.yaml").read_text() == "mine"
    with pytest.raises(OutputError, match="cannot write"):
        new_recipe("r", tmp_path / "nowhere" / "r.yaml")


@pytest.mark.parametrize("name", ["", "../up", 'a"b', "a b", "-x", "a\nb"])
def test_names_that_would_not_stand_in_a_file(name, tmp_path):
    with pytest.raises(InputError, match="valid recipe name"):
        new_recipe(name, tmp_path / "r.yaml")
    assert not (tmp_path / "r.yaml").exists()


def test_other_words_of_an_answer():
    head = "kbne_recipe: 1\nname: x\nprompt: {chat: '{question}', plain: '{question}'}\nanswers: ['yes', 'no']\n"
    items = "questions:\n  items: [{text: 'Is it?', answer: 'yes', form: f, dimension: d}]\n"

    def read(also):
        return Recipe.from_dict(yaml.load(head + also + items, Loader=yaml.BaseLoader) | {"kbne_recipe": 1})

    assert read("").also == {} and read("also: {'no': [nope, never]}\n").also == {"no": ("nope", "never")}
    for also, reply in (
        ("also: {'no': [nope], 'yes': [NOPE]}\n", "a word means two answers"),
        ("also: {'no': [' Yes']}\n", "a word means two answers"),
        ("also: {maybe: [perhaps]}\n", "also: unknown key 'maybe'"),
        ("also: [nope]\n", "also must map answers"),
    ):
        with pytest.raises(RecipeError, match=reply):
            read(also)
    assert load_recipe("social-bias-zh").also["否"] == ("不", "不是", "不对")


@pytest.mark.parametrize("answers", ["['Yes', 'yes']", "['no', ' No ']", "['yes']"])
def test_one_word_is_not_two_answers(answers):
    text = f"name: x\nprompt: {{chat: '{{question}}', plain: '{{question}}'}}\nanswers: {answers}\n"
    items = "questions:\n  items: [{text: 'Is it?', answer: 'yes', form: f, dimension: d}]\n"
    with pytest.raises(RecipeError, match="answers must list two or more different answers"):
        Recipe.from_dict(yaml.load(text + items, Loader=yaml.BaseLoader) | {"kbne_recipe": 1})
