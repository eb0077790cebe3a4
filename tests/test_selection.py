"""Selection against rules written out by hand."""

import math
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest

from kbne_edit import load_recipe, load_scores
from kbne_edit import select as public_select
from kbne_edit.attribution.scores import Row, ScoresWriter
from kbne_edit.errors import EditError, InputError
from kbne_edit.locating import Settings, choosing
from kbne_edit.recipe import Question
from kbne_edit.rule import Rule
from kbne_edit.selection.differences import critical
from kbne_edit.selection.questions import Questions
from kbne_edit.selection.select import selection as public_selection

RULE = ("tau", "beta", "top", "combine", "same_sign")


def _arguments(scores, rule="paper", only=None, **known):
    thresholds = {key: known.pop(key) for key in RULE if key in known}
    requests = Questions.of_arrays(scores, **known) if isinstance(scores, np.ndarray) else scores
    return (requests, Rule(rule, **thresholds)), {"only": only}


def select(scores, **about):
    args, kwargs = _arguments(scores, **about)
    return public_select(*args, **kwargs)


def selection(scores, **about):
    args, kwargs = _arguments(scores, **about)
    return public_selection(*args, **kwargs)


def _scores():
    scores = np.zeros((5, 2, 4), np.float32)
    scores[:, 1, 3] = 1.0  # says the answer to anything
    scores[0:2, 0, 1] = 0.5  # knows dimension a
    scores[2, 0, 2] = 0.5  # knows dimension b
    scores[0, 0, 0] = 0.1  # exactly at the threshold: does not exceed it
    return scores


ABOUT = dict(dimensions=["a", "a", "b", "c", "c"], answers=["no"] * 5, controls=[False] * 3 + [True] * 2)


def test_paper_rule():
    result = selection(_scores(), **ABOUT)
    assert result.edit.factors == {0: {1: 2.0, 2: 2.0}, 1: {3: 2.0}}
    summary = result.summary().to_dict()
    assert summary["controls_overlap"] == 1 and summary["overlap"] == {"a & b": 1}
    assert summary["dimensions"]["a"] == {"neurons": 2, "layers": [0, 1], "controls_overlap": 1}


def test_intersection_and_beta():
    assert select(_scores(), **ABOUT, combine="intersection").factors == {1: {3: 2.0}}
    scores = _scores()
    scores[1, 0, 1] = 0  # counts in half of dimension a now
    assert 1 in select(scores, **ABOUT, beta=0.5).factors[0]
    assert 1 not in select(scores, **ABOUT, beta=0.51).factors[0]


def test_contrastive_rule_drops_what_the_controls_share():
    result = selection(_scores(), **ABOUT, rule="contrastive")
    assert result.edit.factors == {0: {1: 2.0, 2: 2.0}}
    assert result.summary().controls_overlap == 0


def test_contrastive_rule_matches_answer_and_form():
    scores = np.concatenate([_scores(), _scores()[3:]])
    about = dict(dimensions=["a", "a", "b"] + ["c"] * 4, controls=[False] * 3 + [True] * 4, rule="contrastive")
    scores[3:5, 0, 1] = 0.45  # two of the controls reach what (0, 1) has for dimension a
    assert select(scores, **about, answers=["no"] * 7).factors == {0: {2: 2.0}}
    other_answer = ["no"] * 3 + ["yes"] * 2 + ["no"] * 2
    assert select(scores, **about, answers=other_answer).factors == {0: {1: 2.0, 2: 2.0}}
    other_form = ["x"] * 3 + ["y"] * 2 + ["x"] * 2
    assert select(scores, **about, answers=["no"] * 7, forms=other_form).factors == {0: {1: 2.0, 2: 2.0}}
    with pytest.raises(InputError, match="too few controls with the answer 'yes'"):
        select(scores, **about, answers=["no"] * 6 + ["yes"])  # no other to hold that control against


def test_contrastive_rule_on_the_controls_uses_the_other_half():
    scores = np.zeros((6, 1, 3), np.float32)
    scores[:, 0, 0] = 1.0
    scores[0, 0, 1] = scores[1, 0, 1] = 0.5  # of the questions, and of one control in four
    scores[2:, 0, 2] = 0.5  # of every control
    about = dict(dimensions=["a"] * 2 + ["c"] * 4, controls=[False] * 2 + [True] * 4, rule="contrastive", beta=0.25)
    result = selection(scores, **about)
    assert result.edit.factors == {0: {1: 2.0}} and not result.controls.any()
    scores[2, 0, 1] = 0.5
    with pytest.raises(EditError, match="above what the controls reach"):
        selection(scores, **about)  # a quarter of the controls reach it


def test_controls_select_what_the_other_half_does_not():
    """By hand: neuron 1 is used by the first and third control alone, which are one half."""
    scores = np.zeros((6, 1, 3), np.float32)
    scores[:, 0, 0] = 1.0
    scores[0, 0, 2] = scores[2, 0, 1] = scores[4, 0, 1] = 0.5
    about = dict(dimensions=["a"] * 2 + ["c"] * 4, controls=[False] * 2 + [True] * 4, rule="contrastive", beta=0.5)
    assert selection(scores, **about).controls.tolist() == [[False, True, False]]


def test_left_out_questions_do_not_count():
    assert select(_scores(), **ABOUT, only=[True, True, False, True, True]).factors[0] == {1: 2.0}


def test_nothing_selected_and_wrong_settings():
    with pytest.raises(EditError, match="no neuron counts"):
        select(np.full((2, 1, 3), -1.0, np.float32))
    with pytest.raises(InputError):
        select(_scores(), tau=2)
    with pytest.raises(InputError, match="control"):
        select(_scores(), rule="contrastive")


# -------------------------------------------------------------------------------------------- ranks, twins, differences


def test_ranks_in_place_of_tau():
    scores = np.random.default_rng(0).standard_normal((6, 3, 40)).astype(np.float32)
    result = selection(scores, top=0.05, beta=0.5)
    votes = np.zeros(120, int)
    for row in scores.reshape(6, -1):
        votes[np.argsort(-row)[:6]] += 1
    assert {la * 40 + n for la, ns in result.edit.factors.items() for n in ns} == set(np.flatnonzero(votes >= 3))
    assert result.edit.found["select"]["top"] == 0.05 and "top" not in select(scores).found["select"]
    few = np.full((1, 1, 40), -1.0, np.float32)
    few[0, 0, 7] = 1.0
    assert select(few, top=0.5).factors == {0: {7: 2.0}}  # a rank makes nothing of scores below 0


TWINS = dict(
    dimensions=["a", "a"] + ["c"] * 4,
    answers=["no"] * 6,
    controls=[False] * 2 + [True] * 4,
    twins=[2, 3, -1, -1, -1, -1],
    rule="paired",
)


def _with_twins():
    scores = np.zeros((6, 1, 5), np.float32)
    scores[:, 0, 0] = 1.0  # says the answer
    scores[:4, 0, 1] = 0.5  # what question and twin have in common
    scores[0, 0, 2] = 0.5  # of the first question, and not of its twin
    scores[3, 0, 2] = 0.5  # of the other's twin
    return scores


def test_paired_rule():
    assert select(_with_twins(), **TWINS).factors == {0: {2: 2.0}}
    result = selection(_with_twins(), **TWINS)
    assert not result.controls.any()
    scores = _with_twins()
    scores[4, 0, 3] = 0.5  # of one control, and not of the one that stands for its twin
    assert selection(scores, **TWINS).controls.tolist() == [[False, False, False, True, False]]
    scores[5, 0, 3] = 0.5
    assert not selection(scores, **TWINS).controls.any()
    with pytest.raises(InputError, match="question 2 has none"):
        select(_with_twins(), **TWINS | dict(twins=[2] + [-1] * 5))


def test_a_scores_file_knows_the_twins(tmp_path):
    questions = tuple(
        [Question(f"q{i}", "no", "a", "f", False, f"t{i}") for i in (0, 1)]
        + [Question(f"t{i}", "no", "a", "f", True) for i in (0, 1)]
        + [Question(f"c{i}", "no", "c", "f", True) for i in (0, 1)]
    )
    about = {"model": "m", "commit": None, "base": "0" * 64, "recipe": "r", "site": "down"}
    rest = {"p": 0.5, "p_best_wrong": 0.4, "p_answers": 0.9, "p_zero": 0.0, "residual": 0.0, "nodes": 1}
    writer = ScoresWriter(tmp_path / "s.safetensors", questions, 1, 5, about)
    for q, values in enumerate(_with_twins()):
        writer.write(q, Row(values, **rest))
    writer.close()
    scores = load_scores(tmp_path / "s.safetensors")
    assert scores.questions == questions and public_select(scores, "paired").factors == {0: {2: 2.0}}
    assert [set(q) ^ {f.name for f in fields(Question)} for q in scores.settings["questions"]] == [set()] * 2 + [
        {"twin"}
    ] * 4  # files without twins are those of earlier versions, byte for byte


def _planted(seed, strength, questions=18, controls=18):
    """Noise in 600 neurons; five of them speak up in the questions, five in everything."""
    rng = np.random.default_rng(seed)
    count = questions + controls
    scores = rng.standard_exponential((count, 3, 200)).astype(np.float32) * rng.standard_exponential((3, 200)) * 0.02
    scores[:, 0, :5] += 1.0
    scores[:questions, 2, 10:15] += strength
    each = range(count)
    return scores, dict(
        dimensions=["ab"[i // 3 % 2] for i in each],
        answers=[("yes", "no", "no")[i % 3] for i in each],
        forms=[f"f{i % 3}" for i in each],
        controls=[i >= questions for i in each],
        rule="specific",
    )


def test_specific_rule_finds_what_was_planted():
    scores, about = _planted(0, 0.3)
    result = selection(scores, **about, top=0.5)
    assert {(la, n) for la, ns in result.edit.factors.items() for n in ns} == {(2, n) for n in range(10, 15)}
    assert result.summary().unseen == ((0, 5), (0, 5)) and not result.controls.any()
    assert result.counts(0)[2, 10:15].all() and not result.counts(20)[2, 10:15].all()
    assert len(selection(scores, **about, top=2 / 600).edit.factors[2]) <= 4  # two of each dimension
    assert selection(scores, **about | dict(rule="paper"), tau=0.5).summary().unseen == ((5, 5), (5, 5))


def test_specific_rule_finds_nothing_where_nothing_is():
    result = 0
    for seed in range(30):
        scores, about = _planted(seed, 0.0, 9, 9)
        about["dimensions"] = ["a"] * 18
        try:
            selection(scores, **about)
            result += 1
        except EditError as error:
            assert "beyond chance" in str(error)
    assert result <= 6  # of 30 with a chance of 1 in 20, seven or more come in 1 of 2000 such tests


def test_specific_rule_needs_a_spread():
    scores, about = _planted(0, 0.3, 6, 18)  # three questions of each dimension, each of its own form
    assert select(scores, **about | dict(answers=["no"] * 24, dimensions=["a"] * 24)).factors  # matched by answer alone
    with pytest.raises(InputError, match="more questions than answers"):
        select(scores, **about | dict(dimensions=list("aabbcc") + ["d"] * 18))
    with pytest.raises(InputError, match="more questions than answers"):
        select(scores, **about | dict(answers=["no"] * 6 + ["yes"] * 18))
    with pytest.raises(InputError, match="control"):
        select(scores[:6], rule="specific")


def test_overlap_with_controls_that_were_held_out():
    rng = np.random.default_rng(5)
    scores = rng.standard_normal((20, 2, 30)).astype(np.float32)
    about = dict(controls=[False] * 10 + [True] * 10, dimensions=["a"] * 20, tau=0.5)
    result = selection(scores, **about, rule="contrastive")
    share = scores.reshape(20, -1) / scores.reshape(20, -1).max(1, keepdims=True)
    expected = []
    for held in (range(10, 20, 2), range(11, 20, 2)):
        rest = np.sort(share[[q for q in range(10, 20) if q not in held]], 0)[-1]  # one of five is a tenth, rounded up
        chosen = set(np.flatnonzero((share[:10] > 0.5 + np.maximum(rest, 0)).any(0)))
        used = set(np.argsort(-share[list(held)].mean(0), kind="stable")[: len(chosen)])
        expected.append((len(chosen & used), len(chosen)))
    assert result.unseen() == expected and expected[0][1] > 0
    most = np.argsort(-share[10:].mean(0), kind="stable")[: result.edit.num_neurons]
    assert set(np.flatnonzero(result.used_by_controls())) == set(most)
    alone = selection(scores[:10], tau=0.5)
    assert alone.unseen() == [] and alone.used_by_controls() is None


def test_thresholds_of_recipe_and_command():
    recipe = replace(load_recipe("demo"), select=Rule(top=0.01))
    scores = SimpleNamespace(correct=np.ones(2, bool), questions=recipe.questions[:2])
    assert choosing(scores, recipe, Settings()).rule.top == 0.01
    assert choosing(scores, recipe, Settings(tau=0.2)) == (Rule(tau=0.2), [True] * 2)
    assert choosing(scores, recipe, Settings(tau=0.2, top=0.3)).rule.top == 0.3
    assert choosing(scores, recipe, Settings(same_sign=True)).rule == Rule(top=0.01, same_sign=True)
    with pytest.raises(InputError, match="neither --tau nor --beta"):
        choosing(scores, recipe, Settings(rule="specific", beta=0.2))


@pytest.mark.parametrize(
    "wrong", [{"name": "other"}, {"combine": "both"}, {"tau": -0.1}, {"beta": 1.1}, {"top": 2}, {"tau": True}]
)
def test_a_rule_says_what_it_is(wrong):
    for rule in (Rule(), Rule("specific"), Rule("paired", 0.2, 0.07, 0.01, "intersection", True)):
        assert Rule.from_dict(rule.to_dict()) == rule
    assert Rule("paired", 0.2, 0.07, 0.01, "intersection", True).describe() == (
        "rule paired, the largest 1.000% of all neurons, beta 0.07, intersection over the dimensions, same sign for "
        "every right answer"
    )
    assert Rule("specific").describe() == "rule specific, the largest 0.200% of all neurons, union over the dimensions"
    with pytest.raises(InputError):
        Rule(**wrong)


@pytest.mark.parametrize("beta, count, needed", [(0.07, 100, 7), (0.28, 25, 7), (0.1, 9, 1), (0.0, 9, 1)])
def test_a_share_of_questions_is_not_rounded_up_by_floating_point(beta, count, needed):
    """0.07 * 100 is 7.000000000000001: seven questions of a hundred are enough."""
    for votes, kept in ((needed, True), (needed - 1, False)):
        scores = np.zeros((count, 1, 2), np.float32)
        scores[:, 0, 0] = 1.0
        scores[:votes, 0, 1] = 0.5
        assert (1 in select(scores, beta=beta).factors[0]) == kept


def test_same_sign_drops_neurons_that_speak_for_one_answer():
    """Neuron 1 helps whatever is right, neuron 2 pushes towards yes; a plain loop over the means says the same."""
    rng = np.random.default_rng(0)
    scores = rng.normal(0, 0.01, (8, 1, 6)).astype(np.float32)
    answers = ["yes", "no"] * 4
    scores[:, 0, 0] = 1.0
    scores[:, 0, 1] = 0.5
    scores[::2, 0, 2], scores[1::2, 0, 2] = 0.5, -0.4
    about = dict(answers=answers, beta=0.5)
    assert select(scores, **about).factors == {0: {0: 2.0, 1: 2.0, 2: 2.0}}
    result = selection(scores, **about, same_sign=True)
    assert result.edit.factors == {0: {0: 2.0, 1: 2.0}} and result.edit.found["select"]["same_sign"] is True
    for rule in ("contrastive", "specific"):
        both = dict(answers=answers * 2, controls=[False] * 8 + [True] * 8, rule=rule)
        wide = np.concatenate([scores, rng.normal(0, 0.01, (8, 1, 6)).astype(np.float32)])
        wide[8:, 0, 3] = 1.0
        assert 2 in select(wide, **both, top=0.5).factors[0] or rule == "specific"
        assert 2 not in select(wide, **both, top=0.5, same_sign=True).factors[0]
    with pytest.raises(InputError, match="always 'yes'"):
        select(scores, answers=["yes"] * 8, same_sign=True)


def _random_questions(seed):
    """Scores of eighteen questions and fourteen controls with answers and forms; no control has the form "z"."""
    rng = np.random.default_rng(seed)
    scores = (rng.standard_exponential((32, 3, 20)) * rng.choice([1, -1], (32, 3, 20), p=[0.7, 0.3])).astype(np.float32)
    about = dict(
        dimensions=[*rng.choice(["a", "b"], 18), *["c"] * 14],
        answers=[("yes", "no")[i % 2] for i in range(32)],
        forms=[*("xyz"[i // 2 % 3] for i in range(18)), *("xy"[i // 2 % 2] for i in range(14))],
        controls=[i >= 18 for i in range(32)],
        twins=[18 + i * 5 % 14 for i in range(18)] + [-1] * 14,
    )
    return scores, about


def _expected(scores, about, rule, beta, q):
    """What a rule expects of every neuron in question q anyway, neuron by neuron."""
    share = [row.ravel() / row.max() for row in scores]
    if rule == "paper":
        return [0.0] * share[q].size
    if rule == "paired":
        return share[about["twins"][q]]
    answer, form = about["answers"], about["forms"]
    same = [c for c in range(18, 32) if answer[c] == answer[q]]
    pool = [c for c in same if form[c] == form[q]] or same
    needed = max(math.ceil(beta * len(pool)), 1)
    reached = []
    for n in range(share[q].size):  # the largest level that enough of the controls reach
        levels = [share[c][n] for c in pool if sum(share[d][n] >= share[c][n] for d in pool) >= needed]
        reached.append(max(0.0, *levels))
    return reached


@pytest.mark.parametrize("limit", [dict(tau=0.25), dict(top=0.1), dict(top=1e-6)])
@pytest.mark.parametrize("rule", ["paper", "contrastive", "paired"])
@pytest.mark.parametrize("beta, combine", [(0.3, "union"), (0.05, "intersection")])
def test_rules_against_plain_loops(rule, limit, beta, combine):
    """Every question's votes, one neuron after the other, then the share of the dimension's questions."""
    for seed in range(3):
        scores, about = _random_questions(seed)
        kept = {}
        for name in ("a", "b"):
            requests = [q for q in range(18) if about["dimensions"][q] == name]
            votes = [0] * 60
            for q in requests:
                share = scores[q].ravel() / scores[q].max()
                excess = [float(s - e) for s, e in zip(share, _expected(scores, about, rule, beta, q), strict=True)]
                floor = limit.get("tau", 0.0)
                best = sorted(range(60), key=lambda n: -excess[n])
                for n in best[: max(round(limit["top"] * 60), 1)] if "top" in limit else best:
                    votes[n] += excess[n] > floor
            kept[name] = {n for n in range(60) if votes[n] >= max(math.ceil(beta * len(requests)), 1)}
        expected = kept["a"] | kept["b"] if combine == "union" else kept["a"] & kept["b"]
        try:
            factors = select(scores, **about, rule=rule, beta=beta, combine=combine, **limit).factors
        except EditError:
            factors = {}
        assert {20 * la + n for la, ns in factors.items() for n in ns} == expected


def test_equal_ranks_are_all_kept():
    scores = np.zeros((1, 1, 10), np.float32)
    scores[0, 0, [1, 4, 7]] = 0.5
    scores[0, 0, 2] = 1.0
    assert select(scores, top=0.19).factors == {0: {1: 2.0, 2: 2.0, 4: 2.0, 7: 2.0}}  # the nearest number, two
    assert select(scores, top=0.1).factors == select(scores, top=0.0).factors == {0: {2: 2.0}}  # one at least
    with pytest.raises(InputError, match="top is 1.5; it must lie from 0 to 1"):
        select(scores, top=1.5)


def test_specific_rule_against_plain_loops():
    """The order of the lower bounds, from differences, standard errors and the level of chance for all neurons."""
    rng = np.random.default_rng(2)
    scores, about = _planted(3, 0.0, 12, 12)
    scores[:12, 1, :40] += rng.uniform(0.05, 0.4, 40)
    about |= dict(dimensions=["a"] * 24)
    kinds = np.array([f"{a} {f}" for a, f in zip(about["answers"], about["forms"], strict=True)])
    x = (scores / scores.max((1, 2), keepdims=True)).reshape(24, -1)
    first = np.arange(24) < 12
    level = critical([x], kinds, first)
    bounds = np.zeros(600)
    for n in range(600):
        difference = spread = 0.0
        parts = {(k, g): x[(kinds == k) & (first == g), n] for k in set(kinds) for g in (True, False)}
        pooled = {
            g: sum(((p - p.mean()) ** 2).sum() for (_, h), p in parts.items() if h == g) / (12 - 3)
            for g in (True, False)
        }
        for k in set(kinds):
            a, b = parts[k, True], parts[k, False]
            difference += len(a) / 12 * (a.mean() - b.mean())
            spread += (len(a) / 12) ** 2 * (pooled[True] / len(a) + pooled[False] / len(b))
        bounds[n] = difference - level * spread**0.5
    above = np.flatnonzero(bounds > 0)
    assert 8 < len(above) < 40
    for top, count in ((1.0, len(above)), (5 / 600, 5), (None, 1)):  # 0.002 of 600, unless told otherwise
        result = select(scores, **about, top=top).factors
        assert {200 * la + n for la, ns in result.items() for n in ns} == set(np.argsort(-bounds)[:count])


def test_specific_rule_compares_with_matched_controls_only():
    """Controls of another answer, and of another form where the form has controls, might as well not be there."""
    scores, about = _planted(1, 0.3, 12, 24)
    about |= dict(dimensions=["a"] * 36, answers=["no"] * 36, forms=["x"] * 36)
    without = select(scores[:24], **{k: v[:24] if isinstance(v, list) else v for k, v in about.items()}, top=0.5)
    wild = np.random.default_rng(4).standard_exponential((12, 3, 200)) * 9
    for key, other in (("answers", "yes"), ("forms", "y")):
        matched = about | {key: [*about[key][:24], *[other] * 12]}
        changed = np.concatenate([scores[:24], wild.astype(np.float32)])
        assert select(changed, **matched, top=0.5).factors == without.factors != {}
    assert select(changed, **about, top=0.5).factors != without.factors  # all of one kind: now they do take part


def test_twins_are_never_held_out():
    """Under the paired rule: what is held out, and what counts as used, are the controls that are nobody's twin."""
    scores, about = _random_questions(5)
    about |= dict(twins=[18 + i % 8 for i in range(18)] + [-1] * 14)
    own = list(range(26, 32))
    result = selection(scores, **about, rule="paired", beta=0.3)
    count = result.edit.num_neurons
    share = (scores / scores.max((1, 2), keepdims=True)).reshape(32, -1)
    used = set(np.argsort(-share[own].mean(0), kind="stable")[:count])
    assert set(np.flatnonzero(result.used_by_controls())) == used
    selected = {20 * la + n for la, ns in result.edit.factors.items() for n in ns}
    halves = [[c for c in own if _turn(about, c) == half] for half in (0, 1)]
    most = [set(np.argsort(-share[held].mean(0), kind="stable")[:count]) for held in halves]
    assert result.unseen() == [(len(selected & used), count) for used in most]


def _turn(about, control):
    """0 or 1: the controls of each answer and form are dealt in turn."""
    before = [c for c in range(18, control) if all(about[k][c] == about[k][control] for k in ("answers", "forms"))]
    return len(before) % 2
