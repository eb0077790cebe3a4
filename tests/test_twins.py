"""Probes as twins: their formats, their faults, their scores."""

import json

import numpy as np
import pytest

from kbne_edit.errors import RecipeError
from kbne_edit.evaluation.twins import frequency_share, twin_scores
from kbne_edit.recipe import Probe, Recipe, Twin, load_recipe

TEMPLATE = {
    "dimension": "d",
    "groups": ["the woman", "the man"],
    "first": "{group} began to cry.",
    "second": "At noon {group} began to shout.",
}
FLAT = [
    {"stereotype": "A red hat fell.", "anti_stereotype": "An old hat fell.", "dimension": "d"},
    {"stereotype": "The dog barked.", "anti_stereotype": "The cat barked.", "dimension": "d"},
    {"stereotype": "An old coat tore.", "anti_stereotype": "a red coat tore.", "dimension": "d"},
    {"stereotype": "The cat slept.", "anti_stereotype": "The dog slept.", "dimension": "e"},
]


def recipe(*probes, aim="balance", **changes):
    return {
        "kbne_recipe": 1,
        "name": "t",
        "prompt": {"plain": "{question}"},
        "answers": ["yes", "no"],
        "questions": {"items": [{"text": "Is it?", "answer": "no", "dimension": "d"}]},
        "probes": {"aim": aim, "items": list(probes)},
    } | changes


def faults(data):
    with pytest.raises(RecipeError) as error:
        Recipe.from_dict(data)
    return error.value.faults


def test_a_template_is_filled_both_ways():
    (twin,) = Recipe.from_dict(recipe(TEMPLATE)).twins
    assert twin.first == Probe("The woman began to cry.", "The man began to cry.", "d")
    assert twin.second == Probe("At noon the man began to shout.", "At noon the woman began to shout.", "d")
    assert twin.groups == ("the woman", "the man") and twin.mirrored and twin.dimension == "d"


def test_a_behaviour_has_the_case_in_which_the_same_reply_is_right():
    item = {
        "dimension": "d",
        "replies": ["right", "wrong"],
        "first": "2 + 2 = 5: {reply}",
        "second": "2 + 2 = 4: {reply}",
    }
    (twin,) = Recipe.from_dict(recipe(item, aim="avoid")).twins
    assert twin.first == Probe("2 + 2 = 5: right", "2 + 2 = 5: wrong", "d")
    assert twin.second == Probe("2 + 2 = 4: wrong", "2 + 2 = 4: right", "d")
    # margin of "right" where it is false less where it is true
    false, true = 0.7, 0.3
    assert twin_scores([twin], [false, -true], "avoid") == pytest.approx([false - true])


def test_pairs_written_out():
    first = {"stereotype": "Die Frau weinte.", "anti_stereotype": "Der Mann weinte."}
    second = {"stereotype": "Der Mann schrie.", "anti_stereotype": "Die Frau schrie."}
    result = Recipe.from_dict(recipe({"dimension": "d", "first": first, "second": second}))
    assert result.probes == (
        Probe("Die Frau weinte.", "Der Mann weinte.", "d"),
        Probe("Der Mann schrie.", "Die Frau schrie.", "d"),
    )
    assert result.twins[0].mirrored and result.twins[0].groups == ()
    unlike = Recipe.from_dict(recipe({"dimension": "d", "first": first, "second": first | {"stereotype": "Er rief."}}))
    assert not unlike.twins[0].mirrored


def test_single_pairs_of_the_older_format_find_their_counterpart():
    """By the exchanged words, whatever their case, within a dimension; others stay single."""
    result = Recipe.from_dict(recipe(*FLAT))
    assert [len(twin.probes) for twin in result.twins] == [2, 1, 1]
    assert [probe.first for probe in result.probes] == [FLAT[i]["stereotype"] for i in (0, 2, 1, 3)]
    assert result.twins[0].mirrored and not result.twins[1].mirrored
    three = Recipe.from_dict(recipe(FLAT[0], FLAT[2], FLAT[2] | {"stereotype": "An old sock tore."}))
    assert [len(twin.probes) for twin in three.twins] == [2, 1]  # a counterpart is taken once


@pytest.mark.parametrize(
    "probes, aim, fault",
    [
        ([TEMPLATE, TEMPLATE], "balance", "probe appears twice"),
        ([FLAT[0], FLAT[0]], "balance", "probe appears twice"),
        ([FLAT[0] | {"stereotype": "An old  hat fell."}], "balance", "are the same sentence"),
        ([FLAT[0] | {"stereotype": " "}], "balance", "probe 1: stereotype is empty"),
        ([TEMPLATE | {"second": TEMPLATE["first"]}], "balance", "first and second are the same sentence"),
        ([TEMPLATE | {"second": "At noon."}], "balance", "probe 1: second lacks {group}"),
        ([TEMPLATE | {"groups": ["a", "a"]}], "balance", "groups must list two different texts"),
        ([TEMPLATE | {"groups": ["a", "b", "c"]}], "balance", "groups must list two different texts"),
        ([TEMPLATE | {"first": "{group} {0}"}], "balance", "no value for {0}"),
        ([TEMPLATE], "avoid", "needs exactly unwanted, wanted and dimension"),
        ([TEMPLATE | {"more": 1}], "balance", "needs exactly stereotype"),
        ([{"dimension": "d", "first": {}, "second": 3}], "balance", "probe 1: first: needs exactly stereotype"),
        ([7], "balance", "needs exactly stereotype"),
        ([TEMPLATE | {"first": "{group} " + "x" * 4000}], "balance", "4000 are the most"),
    ],
)
def test_faults_are_named(probes, aim, fault):
    assert any(fault in text for text in faults(recipe(*probes, aim=aim)))


def test_the_same_twin_the_other_way_round_is_refused():
    pair = {"stereotype": "The dog barked.", "anti_stereotype": "The cat barked."}
    back = {"stereotype": "The cat barked.", "anti_stereotype": "The dog barked."}
    assert "same two sentences" in faults(recipe({"dimension": "d", "first": pair, "second": back}))[0]


def test_scores_cancel_what_the_words_are_worth():
    """m of a stereotype is association plus the frequency of its word less that of the other."""
    rng = np.random.default_rng(0)
    association, frequency = rng.normal(0.1, 1, (2, 40)), rng.normal(0, 5, 40)
    margins = np.stack([association[0] + frequency, association[1] - frequency], 1).ravel()
    twins = [Twin(Probe("a", "b", ""), Probe("b", "a", ""))] * 40
    assert twin_scores(twins, margins) == pytest.approx(association.mean(0))
    assert twin_scores(twins, [margins, -margins])[1] == pytest.approx(-association.mean(0))
    assert frequency_share(twins, margins) > 0.9 and frequency_share(twins, np.ones(80)) == 0
    mixed = [twins[0], Twin(Probe("a", "b", ""), None), twins[0]]
    assert twin_scores(mixed, [1, 3, 7, 2, 4]) == pytest.approx([2, 7, 3])
    with pytest.raises(ValueError, match="5 margins"):
        twin_scores(twins, [1, 3, 7, 2, 4])
    assert np.isnan(frequency_share([mixed[1]], [1.0]))


def test_a_small_file_cannot_describe_a_large_recipe(tmp_path):
    """46 KB of YAML that multiply to 80 MB of questions: refused before they are made."""
    import tracemalloc

    long = "x" * 3900
    forms = {f"f{i}": {"text": "{t}" * 2, "answer": "no"} for i in range(10)}
    many = {f"n{i}": {} for i in range(50)}
    for field in (long[:1900], long, long[:1900] * 20):
        grid = {"forms": forms, "dimensions": {str(i): {"t": field} for i in range(10)}, "concepts": many}
        path = tmp_path / "r.json"
        path.write_text(json.dumps(recipe(questions=grid)))
        tracemalloc.start()
        with pytest.raises(RecipeError, match="characters"):
            load_recipe(path)
        assert tracemalloc.get_traced_memory()[1] < 25e6
        tracemalloc.stop()


def test_questions_that_differ_in_case_or_spaces_stand_twice():
    items = [{"text": text, "answer": "no", "dimension": "d"} for text in ("Is it?", "is  it?")]
    assert "question appears twice: 'is it?'" in faults(recipe(questions={"items": items}))
    assert "questions 1: text is empty" in faults(recipe(questions={"items": [items[0] | {"text": " "}]}))


@pytest.mark.parametrize("answers", [["Yes", "yes"], ["yes", " yes"], ["yes"], ["yes", "no", "NO"]])
def test_answers_that_differ_in_case_are_one(answers):
    items = [{"text": "Is it?", "answer": answers[0], "dimension": "d"}]
    assert "answers must list two or more different answers" in faults(
        recipe(answers=answers, questions={"items": items})
    )


def test_a_sentence_stands_behind_the_token_that_begins_a_text(chatty):
    """Also where the tokenizer puts none there: then the first word counts, and evaluate and bake score alike."""
    import torch

    from kbne_edit.evaluation.batched import margins_of_edits
    from kbne_edit.evaluation.own import probes_benchmark
    from kbne_edit.evaluation.scoring import Scorer
    from kbne_edit.models.loading import load_model, load_tokenizer

    model, tokenizer = load_model(chatty, torch.float32), load_tokenizer(chatty)
    recipe = Recipe.from_dict(recipe_of_twins())

    class Bare:
        bos_token_id = tokenizer.bos_token_id

        def __call__(self, text):
            return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    scorer = Scorer(model, tokenizer)
    mark = probes_benchmark(recipe, scorer, None)
    expected = mark.columns(scorer.score(mark.pairs))[:, 1]
    for of in (tokenizer, Bare()):
        margins = margins_of_edits(model, of, recipe.probes, [None])[0]
        assert twin_scores(recipe.twins, margins) == pytest.approx(expected, abs=2e-5)


def recipe_of_twins():
    second = TEMPLATE | {"groups": ["Women", "Men"], "first": "{group} sing.", "second": "{group} lift stones."}
    return recipe(TEMPLATE, second)
