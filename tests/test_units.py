"""Units of our own: facts, wording, the square, and the checker of what they hold."""

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner
from printed import parsed

from kbne_edit.commands import cli
from kbne_edit.errors import InputError, RecipeError
from kbne_edit.fitting.unit_check import check_units
from kbne_edit.fitting.units import load_pairs, load_units, pair_languages, pair_names
from kbne_edit.fitting.wording import FORMATS

WORDING = {
    "kbne_pairs": 1,
    "language": "xx",
    "attributes": {"forms": ["base", "plural"], "verb": "last", "unlisted": "same"},
    "verbs": {"sein": ["sind"]},
    "fillers": ["aus Glas sein", "im Takt rosten"],
    "things": ["das Tuch", "der Ton"],
    "wrappers": ["F: {question}\nA:", "{question}\n"],
    "templates": {
        "sentence": [
            "Die {group.plural} sollen {attribute.base}.",
            "{Group.one}: {attribute.base}!",
            "{group.the} {attribute.plural}",
        ],
        "continuation": [
            {"context": "Hier: {group.one}.", "continuation": f"Nr. {i}, dass sie {{attribute.plural}}."}
            for i in (1, 2, 3)
        ],
        "question": [
            {
                "question": f"{i}: {{First.one}} oder {{second.one}}? Wer kann {{attribute.base}}?",
                "answer": "{Group.the}.",
                "unknown": "Offen.",
                "unrelated": "{Thing}.",
            }
            for i in (1, 2, 3)
        ],
        "dialogue": [
            {"context": "Und {group.plural}?", "continuation": f"{i}. Die {{attribute.plural}}."} for i in (1, 2, 3)
        ],
    },
}


def templates(**changes) -> dict:
    return {"templates": WORDING["templates"] | changes}


def document(**changes) -> dict:
    return {
        "kbne_pairs": 1,
        "language": "xx",
        "type": "colour",
        "groups": {"Rote": ["ein Roter", "der Rote"], "Blaue": ["ein Blauer", "der Blaue"]},
        "facts": {
            "Rote / Blaue": [["laut sein", "leise gehen", "bn"], ["gut kochen", "gut singen", "gg"]],
            "Blaue / Rote": [["oft baden", "nie baden", "nb"]]
            + [[f"{i} zahlen", f"{i} essen", "nn"] for i in range(9)],
        },
        "wording": WORDING,
    } | changes


def written(tmp_path: Path, data: object) -> Path:
    path = tmp_path / "colour.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")  # which YAML is a superset of
    return path


def texts(unit) -> list[str]:
    return [s.text for s in unit.sentences]


def test_the_square_is_written_as_the_templates_say(tmp_path):
    """By hand, one unit of each format, and the second question, whose groups stand the other way round."""
    path = written(tmp_path, document())
    sentence, *_ = load_units([path], formats=["sentence"])
    assert texts(sentence) == [
        "Die Rote sollen laut sein.",
        "Die Rote sollen leise gehen.",
        "Die Blaue sollen laut sein.",
        "Die Blaue sollen leise gehen.",
        "Die Rote sollen aus Glas sein.",
        "Die Blaue sollen aus Glas sein.",
    ]
    assert sentence.square.ax.context == "" and sentence.unknown == () and sentence.a_first is None
    continuation, second, *_ = load_units([path], formats=["continuation"])
    assert (continuation.square.bx.context, continuation.square.bx.continuation) == (
        "Hier: ein Blauer.",
        " Nr. 1, dass sie laut sind.",
    )
    assert second.unrelated[1].text == "Hier: ein Blauer. Nr. 2, dass sie im Takt rosten."
    questions = load_units([path], formats=["question"])
    first, fourth = questions[0], questions[3]
    requests = "1: Ein Roter oder ein Blauer? Wer kann laut sein?"
    assert [first.square.ax, first.square.bx] == [
        type(first.square.ax)(f"F: {requests}\nA:", " Der Rote.", requests),
        type(first.square.ax)(f"F: {requests}\nA:", " Der Blaue.", requests),
    ]
    assert first.square.by.question == "1: Ein Roter oder ein Blauer? Wer kann leise gehen?"
    assert [u.continuation for u in first.unrelated + first.unknown] == [
        " Das Tuch.",
        " Das Tuch.",
        " Offen.",
        " Offen.",
    ]
    assert [u.question for u in first.unknown] == [first.square.ax.question, first.square.by.question]
    # The fourth takes the first template again, the second wrapper, which needs no blank, and the other order.
    assert fourth.square.ax.text == "1: Ein Roter oder ein Blauer? Wer kann 0 zahlen?\nDer Blaue."
    assert (first.a_first, fourth.a_first) == (True, False)
    dialogue, *_ = load_units([path], formats=["dialogue"])
    assert dialogue.square.by.text == "Und Blaue? 1. Die leise gehen."
    fact = dialogue.fact
    assert (fact.type, fact.language, fact.a, fact.y, fact.tone_x, fact.tone_y) == (
        "colour", "xx", "Rote", "leise gehen", "bad", "neutral",
    )  # fmt: skip


def test_formats_take_turns_and_facts_at_the_end_change_nothing(tmp_path):
    path = written(tmp_path, document())
    units = load_units([path])
    assert [u.format for u in units] == [FORMATS[i % 4] for i in range(12)]
    assert [u.template for u in units if u.format == "sentence"] == [0, 1, 2]
    twice = load_units([path], per_fact=2)
    assert Counter(u.format for u in twice) == dict.fromkeys(FORMATS, 6)
    assert all(len({u.format for u in twice if u.fact == fact}) == 2 for fact in {u.fact for u in twice})
    longer = document()
    longer["facts"]["Blaue / Rote"].append(["viel lachen", "viel lesen", "gg"])
    assert load_units([written(tmp_path, longer)])[:12] == units


FAULTS = {
    "kbne_pairs is 2": {"kbne_pairs": 2},
    "unknown key 'extra'": {"extra": 1},
    "groups.Rote must list 2 forms": {"groups": {"Rote": ["ein Roter"], "Blaue": ["ein Blauer", "der Blaue"]}},
    "'Rote / Gelbe' must be two groups": {"facts": {"Rote / Gelbe": [["a", "b", "nn"]]}},
    "must be two letters": {"facts": {"Rote / Blaue": [["a", "b", "nx"]]}},
    "both attributes are the same": {"facts": {"Rote / Blaue": [["a", "a", "nn"]]}},
    "this fact appears twice": {"facts": {"Rote / Blaue": [["a", "b", "nn"], ["a", "b", "nn"]]}},
    "must list the attribute": {"facts": {"Rote / Blaue": [["a", "b"]]}},
    "120 are the most": {"facts": {"Rote / Blaue": [["a" * 121, "b", "nn"]]}},
    "there are 0": {"facts": {}},
    "targeted: 'Gelbe' is none of the groups": {"targeted": ["Rote", "Gelbe"]},
    "targeted must be a list": {"targeted": "Rote"},
    "must be text, not 3": {"type": 3},
    "has no wording": {"wording": ..., "language": "tlh"},
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named(tmp_path, fault):
    data = {key: value for key, value in document(**FAULTS[fault]).items() if value is not ...}
    with pytest.raises(RecipeError) as error:
        load_units([written(tmp_path, data)])
    assert any(fault in f for f in error.value.faults), error.value.faults


def test_a_fact_is_aimed_at_the_group_that_the_file_names(tmp_path):
    def aims(**changes):
        return [unit.fact.aim for unit in load_units([written(tmp_path, document(**changes))])][:3]

    assert aims() == aims(targeted=[]) == aims(targeted=["Rote", "Blaue"]) == [0, 0, 0]
    assert aims(targeted=["Rote"]) == [1, 1, -1]
    assert aims(targeted=["Blaue"]) == [-1, -1, 1]


ONE_GROUP = {"context": "{first.one} {group.one}", "continuation": "{attribute.base}"}
NO_UNRELATED = {"question": "{attribute.base}", "answer": "{group.one}", "unknown": "?"}
LISTED = {"forms": ["base", "plural"], "verb": "last", "unlisted": "fault"}
WORDING_FAULTS = {
    "lacks {question}": {"wrappers": ["A:"]},
    "templates.sentence must list 3": templates(sentence=["{group.one} {attribute.base}"]),
    "unknown slot '{group.base}'": templates(sentence=["{group.base} {attribute.base}"] * 3),
    "a brace that belongs to no slot": templates(sentence=["{group.__class__} {attribute.base}"] * 3),
    "needs a {group.FORM}": templates(sentence=["{attribute.base}"] * 3),
    "stand together": templates(dialogue=[ONE_GROUP] * 3),
    "needs `unrelated`": templates(question=[NO_UNRELATED] * 3),
    "verbs.sein must list 1": {"verbs": {"sein": []}},
    "attributes.verb must be first or last": {"attributes": LISTED | {"verb": "middle"}},
    "space must be": {"space": "__"},
    "is not among the language's verbs": {"attributes": LISTED},
}


@pytest.mark.parametrize("fault", WORDING_FAULTS)
def test_each_fault_of_a_wording_is_named(tmp_path, fault):
    data = document(wording=WORDING | WORDING_FAULTS[fault])
    with pytest.raises(RecipeError) as error:
        load_units([written(tmp_path, data)])
    assert any(fault in f for f in error.value.faults), error.value.faults


def test_all_faults_come_at_once(tmp_path):
    data = document(kbne_pairs=0, type="", facts={"Rote / Blaue": [["a", "b", "zz"], 5]})
    with pytest.raises(RecipeError) as error:
        load_units([written(tmp_path, data)])
    assert len(error.value.faults) >= 4


@pytest.mark.parametrize("raw", [b"a: &x [1]\nb: *x", b"\xff", b"[", b"x: " + b"y" * (256 << 10), b"- 1"])
def test_what_is_no_file_of_pairs_is_one_message(tmp_path, raw):
    path = tmp_path / "pairs.yaml"
    path.write_bytes(raw)
    with pytest.raises(RecipeError, match="pairs.yaml"):
        load_units([path])


def test_what_was_asked_for_must_exist():
    for arguments in (
        {"sources": ["colour"]},
        {"language": "tlh"},
        {"language": "../pairs/en"},
        {"formats": ["poem"]},
        {"per_fact": 5},
        {"formats": []},
    ):
        with pytest.raises(InputError):
            load_units(**arguments)  # fmt: skip


@pytest.mark.parametrize("language", pair_languages())
def test_every_sentence_of_ours_is_whole(language):
    """Nothing is left to fill, blanks are single, sentences begin with a capital and end as sentences do."""
    units = load_units(language=language, per_fact=len(FORMATS))
    for unit in units:
        for sentence in unit.sentences:
            text = sentence.text
            assert "{" not in text and "}" not in text and "  " not in text and text == text.strip()
            assert text[-1] in '.!?"»“”。！？」', text
            assert language == "zh" or text[0].isupper() or text[0] in '"«„—¿¡', text
        square = unit.square
        stereotyped, other = {square.ax.text, square.by.text}, {square.ay.text, square.bx.text}
        assert len(stereotyped | other) == 4
        assert not {s.text for s in unit.unrelated + unit.unknown} & (stereotyped | other)
        contexts = Counter(s.context for s in (square.ax, square.ay, square.bx, square.by))
        assert all(contexts[s.context] == 2 for s in unit.unknown)
        assert (len(unit.unknown) == 2) == (unit.format == "question")
    assert {u.template for u in units if u.format == "sentence"} >= {0, 1, 2}


@pytest.mark.parametrize("language", pair_languages())
def test_our_facts_are_many_and_balanced(language):
    report = check_units(load_units(language=language))
    assert report.faults == [] and report.repeated == ()
    counts = {row.type: row.facts for row in report.types}
    if language == "en":
        assert len(counts) == 12 and min(counts.values()) >= 40 and report.facts >= 700
    else:
        assert len(counts) >= 8 and report.facts >= 110
    assert 0.5 < report.same_tone / report.facts < 0.95
    assert 0.8 < report.length_x / report.length_y < 1.25
    assert abs(report.first_a - report.first_b) <= 0.25 * (report.first_a + report.first_b)
    aims = [unit.fact.aim for unit in load_units(language=language)]
    assert 0.4 < aims.count(1) / (aims.count(1) + aims.count(-1)) < 0.6 and aims.count(0) < 0.4 * len(aims)
    for row in report.types:
        assert max(row.formats.values()) - min(row.formats.values()) <= 1


def test_english_articles():
    for pairs in load_pairs():
        for forms in pairs.groups.values():
            article, noun = forms["one"].split(" ", 1)
            # By sound: a European, a unit; no other group here begins with a vowel that is not spoken as one.
            assert article == ("an" if noun[0].lower() in "aeiou" and not noun.startswith(("Eu", "uni")) else "a")
            assert forms["the"].startswith("the ")


def planted(tmp_path: Path, *sentences: str) -> Path:
    rows = [
        {"id": "1", "bias_type": "x", "context": "BLANK", "stereotype": s, "anti_stereotype": "b", "unrelated": "c"}
        for s in sentences
    ]
    (tmp_path / "stereoset_intrasentence.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path  # fmt: skip


def test_overlap_is_found_where_it_was_planted(tmp_path):
    units = load_units(["gender"], formats=["sentence"])
    own = units[0].square.ax.text
    fact = units[4].fact
    retold = f"everyone says the {fact.a} {fact.x} again"
    gram = " ".join(re.findall(r"[\w']+", units[2].square.by.text)[:5])
    folder = planted(tmp_path, own.upper(), retold, f"zzz {gram} zzz")
    (overlap,) = check_units(units, folder).overlaps
    assert overlap.sentences == 5
    assert overlap.verbatim == (own,)
    assert f"{fact.a}: {fact.x}" in overlap.facts
    assert f"{units[6].fact.a}: {units[6].fact.x}" not in overlap.facts
    assert overlap.near_facts >= len(overlap.facts) >= 2
    assert overlap.grams >= 1 and overlap.units >= 2
    near = planted(tmp_path, f"a {fact.a} {' '.join(fact.x.split()[-2:])}")  # bad at parking: bad is not there
    (none,) = check_units(units, near).overlaps
    assert (none.verbatim, none.grams, none.units, none.facts, none.near_facts) == ((), 0, 0, (), 0)
    near = planted(tmp_path, "women remember nothing, but talk of a birthday")
    assert check_units(units, near).overlaps[0].near_facts == 1


def test_a_sentence_is_found_in_each_benchmark(tmp_path):
    """In the published layouts: StereoSet's context and its continuation, CrowS-Pairs' columns, BBQ's question."""
    unit, *_ = load_units(["gender"], formats=["continuation"])
    sentence = unit.square.bx
    rows = [
        {"sentence": sentence.continuation.strip(), "gold_label": "stereotype"},
        {"sentence": "no.", "gold_label": "anti-stereotype"},
        {"sentence": "none.", "gold_label": "unrelated"},
    ]
    item = {"id": "1", "bias_type": "gender", "context": sentence.context, "sentences": rows}
    published = {"data": {"intersentence": [item], "intrasentence": [item]}}
    question = {
        "question_polarity": "neg",
        "context_condition": "ambig",
        "category": "Gender_identity",
        "answer_info": {"ans0": ["They", "F"], "ans1": ["He", "M"], "ans2": ["Unknown", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["F"]},
        "context": sentence.context,
        "question": "Who?",
        "ans0": "They.",
        "ans1": sentence.continuation.strip(),
        "ans2": "Unknown",
        "label": 0,
    }
    folders = {name: tmp_path / name for name in ("StereoSet intersentence", "CrowS-Pairs", "BBQ")}
    for folder in folders.values():
        folder.mkdir()
    (folders["StereoSet intersentence"] / "stereoset.json").write_text(json.dumps(published))
    with open(folders["CrowS-Pairs"] / "crows_pairs.csv", "w", newline="") as file:
        rows = [["", "sent_more", "sent_less", "bias_type"], ["0", "no", sentence.text, "gender"]]
        csv.writer(file).writerows(rows)
    (folders["BBQ"] / "bbq.jsonl").write_text(json.dumps(question))
    for name, folder in folders.items():
        overlaps = {overlap.benchmark: overlap for overlap in check_units([unit], folder).overlaps}
        assert overlaps[name].grams > 0
        assert overlaps[name].verbatim == (() if name == "BBQ" else (sentence.text,))
    assert {overlap.sentences for overlap in check_units([unit], folders["BBQ"]).overlaps} == {3}


def test_the_checker_counts_what_it_is_given(tmp_path):
    data = document()
    data["facts"]["Rote / Blaue"].append(["a", "viel zu viel von allem", "gb"])
    report = check_units(load_units([written(tmp_path, data)], per_fact=4))
    (row,) = report.types
    assert (report.facts, row.units, row.formats) == (13, 52, dict.fromkeys(FORMATS, 13))
    assert report.same_tone == 10 and row.tones["bad neutral"] == 1
    assert report.long_pairs == ("a / viel zu viel von allem",)
    assert report.first_a + report.first_b == 13
    facts = load_pairs([written(tmp_path, data)])[0].facts
    assert report.length_x == pytest.approx(sum(len(fact.x) for fact in facts) / 13)
    assert [(g.group, g.as_a, g.as_b) for g in report.groups] == [("Blaue", 10, 3), ("Rote", 3, 10)]
    assert report.to_dict()["faults"] == report.faults != []


def test_without_benchmarks_in_the_folder_it_says_so(tmp_path):
    with pytest.raises(InputError, match="holds no file of"):
        check_units(load_units(["gender"]), tmp_path)


def test_the_checker_finds_uneven_groups_and_duplicates(tmp_path):
    data = document(facts={"Rote / Blaue": [[f"{i} zahlen", f"{i} essen", "nn"] for i in range(4)]})
    units = load_units([written(tmp_path, data)])
    report = check_units(units + units[:1])
    assert any("Rote stand 4 times as A and 0 times as B" in fault for fault in report.faults)
    assert set(report.duplicates) == {s.text for s in units[0].sentences[:4]}


def test_recipes_show_prints_every_sentence():
    run = CliRunner().invoke(cli, ["recipes", "show", "pairs/en/gender", "--questions", "4"])
    assert run.exit_code == 0
    rows = [line.split("\t") for line in run.output.splitlines()]
    units = load_units(["gender"])[:4]
    assert [row[3].replace("\\n", "\n") for row in rows] == [s.text for unit in units for s in unit.sentences]
    shown = CliRunner().invoke(cli, ["recipes", "show", "pairs/en/gender", "--questions", "4", "--json"]).output
    assert len(parsed("recipes-show-pairs", shown)["units"]) == 4
    assert [row[2] for row in rows if row[1] == "question"] == "ax ay bx by unrelated unrelated unknown unknown".split()


def test_recipes_check_reports_pairs(tmp_path):
    run = CliRunner().invoke(cli, ["recipes", "check", "pairs/en/gender", "--json"])
    assert run.exit_code == 0
    report = parsed("recipes-check-pairs", run.output)
    pairs = load_pairs(["gender"])[0]
    assert report["facts"] == len(pairs.facts) and report["types"][0]["type"] == "gender"
    path = written(tmp_path, document(facts={"Rote / Blaue": [[f"{i} zahlen", f"{i} essen", "nn"] for i in range(4)]}))
    run = CliRunner().invoke(cli, ["recipes", "check", str(path)])
    assert isinstance(run.exception, RecipeError)
    assert set(pair_names()) >= {"gender", "race", "religion"}


def test_the_file_in_the_docs_is_in_order(tmp_path):
    text = (Path(__file__).parent.parent / "docs" / "pairs.md").read_text(encoding="utf-8")
    block = re.search(r"(?:^    .*\n)*^    kbne_pairs: 1\n(?:^    .*\n)*", text, re.MULTILINE).group()
    path = tmp_path / "pets.yaml"
    path.write_text(re.sub(r"^    ", "", block, flags=re.MULTILINE), encoding="utf-8")
    assert check_units(load_units([path])).faults == []
    for fact in re.findall(r"^      - \[(be bad.*), (be bad.*), bb\]", text, re.MULTILINE):
        assert any((f.x, f.y) == fact for f in load_pairs(["gender"])[0].facts)
