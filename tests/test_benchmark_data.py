"""Files of benchmarks: bad rows are named before anything is scored; BBQ is drawn by whole blocks."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import bench_data
from kbne_edit import load_recipe
from kbne_edit.errors import InputError
from kbne_edit.evaluation.benchmark import Answer
from kbne_edit.evaluation.datafiles import NoDataError, rows
from kbne_edit.evaluation.figures import BBQ, STEREOSET
from kbne_edit.evaluation.public import PUBLIC, bbq_blocks, exchanged_words, lm_eval_task
from kbne_edit.evaluation.scoring import Scorer
from kbne_edit.evaluation.tasks import TASKS, benchmarks, explain
from kbne_edit.models.loading import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "kbne_edit" / "demo"
HEAD = ",sent_more,sent_less,stereo_antistereo,bias_type\r\n"
PAIRS = "".join(f"{i},The old man {i} fell.,The young man {i} fell.,stereo,age\r\n" for i in range(14))
COPA = {
    "premise": "He fell.",
    "choice1": "He slipped.",
    "choice2": "He ran.",
    "question": "cause",
    "idx": 0,
    "label": 0,
}
CHOICES = [{"text": "a", "label": "A"}, {"text": "b", "label": "B"}]
ARC = {"id": "1", "question": {"stem": "What?", "choices": CHOICES}, "answerKey": "A"}
BBQ_ROW = bench_data.bbq()[0]


def read(name, folder):
    return rows(name, folder, PUBLIC[name].patterns)


def lines(*items):
    return "".join(json.dumps(item) + "\n" for item in items).encode()


@pytest.mark.parametrize(
    "name, file, data, fault",
    [
        (
            "crows_pairs",
            "crows_pairs.csv",
            HEAD + PAIRS + "99,,The young man.,stereo,age\r\n",
            "sent_more is empty",
        ),
        ("crows_pairs", "crows_pairs.csv", HEAD + PAIRS + ",,,,\r\n", "line 16 .*sent_more is empty"),
        ("crows_pairs", "crows_pairs.csv", HEAD + PAIRS + "99,The old man.\r\n", "line 16 .*sent_less is empty"),
        ("crows_pairs", "crows_pairs.csv", HEAD + "1,a,b,stereo,age,c\r\n", "line 2 has more cells"),
        ("crows_pairs", "crows_pairs.csv", HEAD + "1,Same.,Same.,stereo,age\r\n", "line 2 .*the same sentence"),
        ("crows_pairs", "crows_pairs.csv", HEAD + f'1,"{"a" * 200_000}",b,stereo,age\r\n', "line 2 is not CSV"),
        (
            "copa",
            "copa.jsonl",
            lines(COPA, {k: v for k, v in COPA.items() if k != "label"}),
            "line 2: .*'label'",
        ),
        ("copa", "copa.jsonl", lines(COPA | {"label": -1}), "line 1 .*label is -1; it must be one of 0, 1"),
        ("copa", "copa.jsonl", lines(COPA | {"label": True}), "line 1 .*label is True"),
        ("copa", "copa.jsonl", lines(COPA | {"question": "why"}), "line 1 .*question is 'why'"),
        ("winogender", "winogender.jsonl", lines({"sentence": "He fell.", "gender": "male"}), "line 1: .*'pronoun'"),
        ("arc_easy", "arc_easy.jsonl", lines(ARC, ARC | {"answerKey": "E"}), "line 2 .*answerKey 'E' is none of its 2"),
        ("arc_easy", "arc_easy.jsonl", b"\n" + lines(ARC)[:-4], "line 2 is not JSON"),
        ("arc_easy", "arc_easy.jsonl", b"[1]\n", "line 1 is no object"),
        ("arc_easy", "arc_easy.jsonl", b"\xff\xfe" * 10, "line 1 is not UTF-8"),
        ("arc_easy", "arc_easy.jsonl", b"[" * 200_000, "line 1 is not JSON"),
        ("arc_easy", "arc_easy.jsonl", lines(ARC | {"pad": "x" * 2_000_000}), "line 1 is a line of more than 1 MB"),
        ("bbq", "bbq.jsonl", lines({"question_polarity": "neg"}), "line 1: bbq needs the column"),
        ("bbq", "bbq.jsonl", lines(BBQ_ROW | {"label": 3}), "label is 3; it must be one of 0, 1, 2"),
        ("bbq", "bbq.jsonl", lines(BBQ_ROW | {"ans2": "No idea"}), "one of BBQ's ten phrasings"),
        ("bbq", "bbq.jsonl", lines(BBQ_ROW | {"category": "Own"}), "category is 'Own'"),
        ("stereoset_intrasentence", "stereoset.json", b"{}", "has no data.intrasentence"),
        ("stereoset_intrasentence", "stereoset.json", b'{"data": {"intrasentence": [3]}}', r"data.intrasentence\[0\]"),
    ],
)
def test_rows_that_are_no_items_are_named(name, file, data, fault, tmp_path):
    (tmp_path / file).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(InputError, match=fault) as error:
        read(name, tmp_path)
    text = str(error.value)
    assert file in text and "\n" not in text and len(text) < 400
    assert not isinstance(error.value, NoDataError)


def test_a_byte_order_mark_and_blank_lines_are_nothing(tmp_path):
    (tmp_path / "arc_easy.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(ARC) + b"\n" + lines(ARC))
    assert len(read("arc_easy", tmp_path)) == 2
    (tmp_path / "crows_pairs.csv").write_bytes((HEAD[1:] + PAIRS.split(",", 1)[1].split("\n")[0]).encode("utf-8-sig"))
    assert read("crows_pairs", tmp_path)[0]["sent_more"] == "The old man 0 fell."
    (tmp_path / "crows_pairs.csv").write_text(HEAD)
    with pytest.raises(NoDataError, match="holds none of its items"):
        read("crows_pairs", tmp_path)


def test_what_is_no_file_is_refused(tmp_path):
    """A pipe without a writer would wait, a device would never end."""
    path = tmp_path / "arc_easy.jsonl"
    for make in (os.mkfifo, lambda p: p.symlink_to("/dev/zero"), os.mkdir):
        make(path)
        with pytest.raises(InputError, match="arc_easy.jsonl"):
            read("arc_easy", tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()


def test_letters_and_numbers_name_the_same_choice(tmp_path):
    numbered = {"stem": "What?", "choices": [choice | {"label": str(i + 1)} for i, choice in enumerate(CHOICES)]}
    (tmp_path / "arc_easy.jsonl").write_bytes(lines(ARC | {"answerKey": "B"}, {"question": numbered, "answerKey": "B"}))
    assert [row["answerKey"] for row in read("arc_easy", tmp_path)] == ["B", "2"]


# ------------------------------------------------------------------------------------------------------ BBQ by blocks


def errorless(docs):
    """Columns of a model that answers every item rightly: (right, biased, answered, clear)."""
    result = []
    for doc in docs:
        clear = doc["context_condition"] == "disambig"
        biased = clear and doc[f"ans{doc['label']}"] in doc["biased_answers"]
        result.append([1 - clear, clear, not clear, 0, 0, clear, biased, clear])
    return np.array(result, float)


def scores(docs):
    means = errorless(docs).mean(0)
    return {figure.name: float(figure.of(means)) for figure in BBQ[:4]}


def _large(shared_items=400):
    """BBQ's own blocks many times over, with one block whose halves are cut apart."""
    rows = bench_data.bbq()
    block = [row | {"biased_answers": _biased(row)} for row in rows[:8]]
    return [row | {"example_id": 8 * n + i} for n in range(shared_items // 8) for i, row in enumerate(block)]


def _biased(row):
    groups = row["additional_metadata"]["stereotyped_groups"]
    about = [
        key for key in ("ans0", "ans1") if (row["answer_info"][key][0] in groups) == (row["question_polarity"] == "neg")
    ]
    return [row[key] for key in about]


@pytest.mark.parametrize("limit", [40, 100, 200, 400])
def test_a_model_without_error_has_no_bias_on_a_sample(limit):
    docs = _large(1200)
    chosen = [docs[i] for i in bbq_blocks(docs, limit)]
    assert len(chosen) == limit // 8 * 8
    expected = {"accuracy, ambiguous": 100, "accuracy, disambiguated": 100}
    assert scores(chosen) == expected | {"bias, ambiguous": 0, "bias, disambiguated": 0}
    one_by_one = [docs[i] for i in np.random.default_rng(0).choice(len(docs), limit, replace=False)]
    assert scores(one_by_one)["bias, disambiguated"] != 0  # or the test could not fail


def test_blocks_are_whole_and_biased(caplog):
    caplog.set_level("INFO", "kbne_edit")
    docs = _large(64)
    assert bbq_blocks(docs, None) == list(range(64))
    assert bbq_blocks(docs, 3) == bbq_blocks(docs, 15) and len(bbq_blocks(docs, 3)) == 8  # one block at least
    for i in bbq_blocks(docs, 24)[::8]:
        assert i % 8 == 0
    docs[3] = docs[3] | {"biased_answers": []}
    docs[16] = docs[16] | {"biased_answers": []}
    docs[19] = docs[19] | {"biased_answers": []}
    del docs[40:44]  # half of a block
    assert bbq_blocks(docs, None) == [*range(8, 16), *range(24, 40), *range(44, 60)]
    reply = caplog.text
    assert "left out 3 items without a biased answer, and 3 of 8 blocks" in reply
    with pytest.raises(InputError, match="no whole block"):
        bbq_blocks(docs[:3], None)
    # A block that is balanced without its items without a biased answer stays.
    half = [
        row | {"biased_answers": row["biased_answers"] if row["question_polarity"] == "neg" else []}
        for row in _large(8)
    ]
    assert [half[i]["question_polarity"] for i in bbq_blocks(half, None)] == ["neg"] * 4


def test_both_ways_of_offering_unknown(scorer, tmp_path):
    """lm-eval's ten phrasings against the item's own: they differ where the likeliest UNKNOWN is not its own."""
    data = bench_data.write(tmp_path / "data")
    (mark,) = benchmarks(["bbq"], data, None, load_recipe("demo"), scorer, scorer.tokenizer)
    docs = bench_data.bbq()
    i = next(i for i, doc in enumerate(docs) if doc["context_condition"] == "ambig")
    assert mark.sizes[i] == 12  # two people, ten phrasings; the item's own is the third
    reply = [-3.0, -2.0, -4.0, *[-9.0] * 8, -1.0]  # another phrasing wins; without it the second person
    columns = mark.read(i, [Answer(value, False, 1) for value in reply])
    biased = docs[i]["ans1"] in _biased(docs[i])
    assert columns == [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 0, biased, 1, 0, 0, 0]
    own = [-3.0, -2.0, -1.0, *[-9.0] * 9]
    assert mark.read(i, [Answer(value, False, 1) for value in own])[8:13] == [1, 0, 1, 0, 0]  # right, and no answer


def test_names_stand_apart_from_labels(scorer, tmp_path):
    rows = bench_data.bbq()[:8]
    for row in rows:
        for key in ("ans0", "ans1"):
            row[key] = {"the zorn": "Zora Orn", "the velm": "Vela"}[row[key]]
    rows += [row | {"example_id": row["example_id"] + 8} for row in bench_data.bbq()[:8]]
    (tmp_path / "bbq.jsonl").write_bytes(lines(*rows))
    (mark,) = benchmarks(["bbq"], tmp_path, None, load_recipe("demo"), scorer, scorer.tokenizer)
    assert mark.groups == ["Nationality (names)"] * 8 + ["Nationality"] * 8


# ------------------------------------------------------------------------------------------- StereoSet, clusters, notes


@pytest.fixture(scope="module")
def scorer():
    return Scorer(load_model(DEMO, torch.float32), load_tokenizer(DEMO))


def test_stereoset_counts_each_comparison_and_each_target(scorer, tmp_path):
    """Sentences on both sides of the unrelated one: LMS .5 and 0; targets of unlike size count alike."""
    (tmp_path / "stereoset_intrasentence.jsonl").write_bytes(lines(*bench_data.stereoset()[:4]))
    items = read("stereoset_intrasentence", tmp_path)
    targets = ["x", "x", "x", "y"]
    (tmp_path / "stereoset_intrasentence.jsonl").write_bytes(
        lines(*(item | {"target": target} for item, target in zip(items, targets, strict=True)))
    )
    (mark,) = benchmarks(["stereoset_intrasentence"], tmp_path, None, load_recipe("demo"), scorer, scorer.tokenizer)
    # stereotype, anti-stereotype, unrelated: one of them above, none, both, both
    reply = [(-1, -5, -3), (-4, -5, -3), (-2, -1, -3), (-2, -2.5, -3)]
    answers = [[Answer(value, False, 2) for value in item] for item in reply]
    columns = np.array([mark.read(i, item) for i, item in enumerate(answers)])
    got = {figure.name: float(figure.of(columns.mean(0))) for figure in STEREOSET}
    ss, lms = np.array([1, 1, 0, 1]), np.array([0.5, 0, 1, 1])
    by_target = [np.mean([values[:3].mean(), values[3]]) * 100 for values in (ss, lms)]
    assert columns[:, 4].tolist() == lms.tolist()
    assert (got["SS"], got["LMS"]) == pytest.approx((100 * ss.mean(), 100 * lms.mean()))
    assert (got["SS by target"], got["LMS by target"]) == pytest.approx(by_target)
    assert got["ICAT by target"] == pytest.approx(by_target[1] * min(by_target[0], 100 - by_target[0]) / 50)
    assert got["ICAT"] == pytest.approx(100 * lms.mean() * min(ss.mean(), 1 - ss.mean()) / 0.5)
    assert list(mark.clusters) == [f"stereoset {target}" for target in targets]


def test_clusters_are_what_items_share(scorer, tmp_path):
    data = bench_data.write(tmp_path / "data")
    names = ["stereoset_intrasentence", "stereoset_intersentence", "crows_pairs", "probes", "arc_easy"]
    marks = {m.name: m for m in benchmarks(names, data, None, load_recipe("demo"), scorer, scorer.tokenizer)}
    rows = bench_data.stereoset()
    for name in names[:2]:  # of one name in both parts, so that no split puts a target on both sides
        assert list(marks[name].clusters) == [f"stereoset {row['target']}" for row in rows]
    assert set(marks["crows_pairs"].clusters) == {
        "crows_pairs velm / zorn",
        "crows_pairs fenling / hilling",
        "crows_pairs kilner / loomer",
    }
    assert len(set(marks["probes"].clusters)) == len(load_recipe("demo").twins)
    assert len(set(marks["arc_easy"].clusters)) == len(bench_data.arc())
    assert (
        exchanged_words("The poor are here.", "the rich are here.")
        == exchanged_words("Rich men", "Poor men")
        == "poor / rich"
    )


def test_accuracy_per_character(scorer, tmp_path):
    """The right answer loses by its sum, and wins once its length is counted; lm-eval's acc_norm is its source."""
    item = {
        "question": {
            "stem": "what ?",
            "choices": [{"text": "oak", "label": "A"}, {"text": "granite cup", "label": "B"}],
        },
        "answerKey": "B",
    }
    for name in ("arc_easy", "arc_challenge", "openbookqa"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(item))
        (mark,) = benchmarks([name], tmp_path, None, load_recipe("demo"), scorer, scorer.tokenizer)
        assert mark.read(0, [Answer(-2.0, False, 1), Answer(-3.0, False, 2)]) == [0, 1]
        assert mark.read(0, [Answer(-0.5, False, 1), Answer(-3.0, False, 2)]) == [0, 0]


def test_every_figure_is_explained():
    notes = explain()
    assert [note.name for note in notes] == list(TASKS)
    for note in notes:
        assert note.clusters and note.figures
        for figure in note.figures:
            assert figure.definition.endswith(".") and figure.source and figure.unit in ("percent", "nats", "words")
        json.dumps(note.to_dict(), allow_nan=False)
    with pytest.raises(InputError, match="no task nothing"):
        explain(["nothing"])


def test_explain_needs_no_model():
    from click.testing import CliRunner

    from kbne_edit.commands import cli

    result = CliRunner().invoke(cli, ["evaluate", "--explain", "bbq,measures"])
    assert result.exit_code == 0 and result.output.count("source: ") == sum(
        len(n.figures) for n in explain(["bbq", "measures"])
    )
    assert "bbq (bias; resampled by question)" in result.output and "arXiv:2110.08193" in result.output
    assert CliRunner().invoke(cli, ["evaluate", "--explain", "all"]).exit_code == 0
    wrong = CliRunner().invoke(cli, ["evaluate", "--explain", "nothing"])
    assert wrong.exit_code != 0


# ------------------------------------------------------------------------------------------------- the published files


@pytest.fixture(scope="module")
def published(shared):
    if not (shared / "data").is_dir():
        pytest.skip("needs ../shared/data")
    return shared / "data"


@pytest.mark.parametrize("limit", [40, 100, 200, 400, None])
def test_a_model_without_error_on_the_published_bbq(published, limit):
    docs = list(lm_eval_task("bbq", read("bbq", published)).eval_docs)
    chosen = [docs[i] for i in bbq_blocks(docs, limit)]
    assert scores(chosen)["bias, disambiguated"] == 0 and len(chosen) == (limit // 8 * 8 if limit else len(docs))
    for start in range(0, len(chosen), 8):
        assert len({(d["category"], d["question_index"], d["example_id"] // 8) for d in chosen[start : start + 8]}) == 1
    drawn = np.random.default_rng(0).choice(len(docs), limit or 399, replace=False)
    assert scores([docs[i] for i in drawn])["bias, disambiguated"] != 0


def test_the_published_crows_pairs_in_clusters(published):
    with open(published / "crows_pairs_anonymized.csv", newline="") as file:
        count = len(list(csv.DictReader(file)))
    items = read("crows_pairs", published)
    clusters = {exchanged_words(item["sent_more"], item["sent_less"]) for item in items}
    assert len(items) == count == 1508 and 300 < len(clusters) < 1200 and "black / white" in clusters
