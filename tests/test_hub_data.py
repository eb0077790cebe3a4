"""Items from the Hub: the real clients, as a separate process, against a server on this machine (tests/hub.py).

The repositories have the layouts of the real ones: Parquet with class numbers and columns of lists (StereoSet, ARC,
OpenBookQA, COPA), JSON lines (BBQ), tab-separated values (Winogender). The items are those of the tests' own files.
"""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value, disable_progress_bars

import bench_data
from hub import DATASETS, Fault, serving

pytestmark = pytest.mark.slow  # each test is a process or two that import lm-eval
ROOT = Path(__file__).resolve().parent.parent
LABELS = ["anti-stereotype", "stereotype", "unrelated"]
TASKS = (
    "stereoset_intrasentence",
    "stereoset_intersentence",
    "crows_pairs",
    "bbq",
    "winogender",
    "arc_easy",
    "arc_challenge",
    "openbookqa",
    "copa",
)
# Prints every task's items, first from the Hub and then from the folder: what is asked, in tokens, and how it is split.
ITEMS = """
import json, sys
from pathlib import Path
import torch
from kbne_edit import load_recipe
from kbne_edit.models.loading import load_model, load_tokenizer
from kbne_edit.evaluation.scoring import Scorer
from kbne_edit.evaluation.tasks import benchmarks
demo, folder, *names = sys.argv[1:]
scorer = Scorer(load_model(Path(demo), torch.float32), load_tokenizer(Path(demo)))
found = [benchmarks(names, data, None, load_recipe("demo"), scorer, scorer.tokenizer) for data in (None, Path(folder))]
print(json.dumps([{m.name: [m.pairs, m.sizes, m.groups, m.clusters] for m in marks} for marks in found]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder for --data with files of all tasks."""
    folder = bench_data.write(tmp_path_factory.mktemp("hub") / "data")
    (folder / "stereoset_intrasentence.jsonl").unlink()  # dev.json has both parts

    def write(name, rows):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("arc_challenge", bench_data.arc()[::-1])
    write("openbookqa", bench_data.arc()[1:5])
    write("copa", _copa())
    write("winogender", _winogender())
    return folder


def _copa():
    return [
        {
            "premise": f"the {thing} is old .",
            "choice1": "It is a cup .",
            "choice2": "It is on the gate .",
            "question": ("cause", "effect")[i % 2],
            "idx": i,
            "label": i % 2,
        }
        for i, thing in enumerate(bench_data.THINGS)
    ]


def _winogender():
    return [
        {
            "sentid": f"{job}.{gender}",
            "sentence": f"the {job} is at the gate .",
            "pronoun": pronoun,
            "occupation": job,
            "participant": "leader",
            "gender": gender,
            "target": job,
            "label": 0,
        }
        for job in bench_data.JOBS[2:5]
        for gender, pronoun in (("male", "he"), ("female", "she"))
    ]


def _parquet(rows, **features):
    """features: of the columns whose types are not plain to see."""
    dataset = Dataset.from_list(rows)
    disable_progress_bars()
    dataset.cast(Features(dataset.features | features)).to_parquet(stream := io.BytesIO())
    return stream.getvalue()


def _stereoset(part):
    rows = [
        item
        | {
            "sentences": {
                "sentence": [s["sentence"] for s in item["sentences"]],
                "id": [f"{i}" for i in range(3)],
                "gold_label": [LABELS.index(s["gold_label"]) for s in item["sentences"]],
            }
        }
        for item in bench_data.published(bench_data.stereoset())["data"][part]
    ]
    text = [Value("string")]
    return _parquet(rows, sentences={"sentence": text, "id": text, "gold_label": [ClassLabel(names=LABELS)]})


def _choices(rows, stem):
    """Choices as columns; the right one under the label that it has there."""
    result = []
    for row in rows:
        labels = [choice["label"] for choice in row["question"]["choices"]]
        right = row["answerKey"] if row["answerKey"] in labels else labels["ABCD".index(row["answerKey"])]
        texts = [choice["text"] for choice in row["question"]["choices"]]
        result.append(
            {
                "id": row["id"],
                stem: row["question"]["stem"],
                "choices": {"text": texts, "label": labels},
                "answerKey": right,
            }
        )
    return _parquet(result)


def _repository(configs):
    """{file: bytes}. configs: {name: {split: (file, bytes)}}; the card says which files are which."""
    card = {
        "configs": [
            {"config_name": name, "data_files": [{"split": split, "path": path} for split, (path, _) in splits.items()]}
            for name, splits in configs.items()
        ]
    }
    files = {path: content for splits in configs.values() for path, content in splits.values()}
    return {"README.md": f"---\n{yaml.safe_dump(card)}---\n# Own items\n".encode()} | files


def _sharded(name, splits):
    return {split: (f"{name}/{split}-00000-of-00001.parquet", content) for split, content in splits.items()}


@pytest.fixture(scope="module")
def repositories(data):
    """{name on the Hub: its files}. The splits that are not evaluated hold other items."""
    arc, copa, gender = bench_data.arc(), _copa(), _winogender()

    def choices(rows, stem):
        other = _choices(rows[:1], stem)
        return {"train": other, "validation": other, "test": _choices(rows, stem)}

    def copas(rows):
        return _parquet(rows, label=ClassLabel(names=["choice1", "choice2"]))

    tsv = "\n".join("\t".join(map(str, row)) for row in ([*gender[0]], *(row.values() for row in gender))) + "\n"
    return {
        "McGill-NLP/stereoset": _repository(
            {part: _sharded(part, {"validation": _stereoset(part)}) for part in ("intersentence", "intrasentence")}
        ),
        "jannalu/crows_pairs_multilingual": _repository(
            {"english": {"test": ("english.csv", (data / "crows_pairs_anonymized.csv").read_bytes())}}
        ),
        "oskarvanderwal/bbq": _repository({"All": {"test": ("data/All.jsonl", (data / "bbq_Own.jsonl").read_bytes())}}),
        "oskarvanderwal/winogender": _repository({"all": {"test": ("test.tsv", tsv.encode())}}),
        "allenai/ai2_arc": _repository(
            {
                "ARC-Easy": _sharded("ARC-Easy", choices(arc, "question")),
                "ARC-Challenge": _sharded("ARC-Challenge", choices(arc[::-1], "question")),
            }
        ),
        "allenai/openbookqa": _repository({"main": _sharded("main", choices(arc[1:5], "question_stem"))}),
        "aps/super_glue": _repository(
            {
                "copa": _sharded(
                    "copa",
                    {
                        "train": copas(copa[:1]),
                        "validation": copas(copa),
                        "test": copas([row | {"label": -1} for row in copa[:2]]),
                    },
                )
            }
        ),
    }


@pytest.fixture(scope="module")
def server():
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server, repositories):
    server.repos.clear(), server.faults.clear(), server.requests.clear()
    for name, files in repositories.items():
        server.add(DATASETS + name, files)
    return server


def _process(hub, home, *command, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    kept |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=home,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_items_from_the_hub_are_those_of_the_same_files(hub, data, tmp_path):
    """Every task; and once more from the cache, with no Hub at all."""
    for environment in ({}, {"HF_HUB_OFFLINE": "1"}):
        result = _process(hub, tmp_path, "-c", ITEMS, ROOT / "kbne_edit" / "demo", data, *TASKS, **environment)
        assert result.returncode == 0, result.stderr
        from_hub, from_files = json.loads(result.stdout)
        assert list(from_hub) == list(TASKS)
        for name in TASKS:
            assert from_hub[name] == from_files[name], name
        assert bool(hub.requests) == (not environment)
        hub.requests.clear()
    counts = {name: len(sizes) for name, (_, sizes, _, _) in from_hub.items()}
    assert counts == {
        "stereoset_intrasentence": 24,
        "stereoset_intersentence": 24,
        "crows_pairs": 15,
        "bbq": 24,
        "winogender": 6,
        "arc_easy": 6,
        "arc_challenge": 6,
        "openbookqa": 4,
        "copa": 4,
    }


def _refused(hub, home, *parts, **environment):
    result = _process(
        hub,
        home,
        ROOT / "cli.py",
        "evaluate",
        "--in",
        "demo",
        "--tasks",
        "copa",
        "--out",
        home / "r.json",
        **environment,
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode in (2, 3) and len(errors) == 1 and "Traceback" not in result.stderr, result.stderr
    assert errors[0].startswith("error: copa: the Hub does not give its data") and "--data DIR" in errors[0]
    assert all(part in errors[0] for part in parts), errors[0]
    assert not result.stdout and not (home / "r.json").exists()


def test_without_the_hub(hub, tmp_path):
    _refused(hub, tmp_path, "'aps/super_glue'", "OfflineModeIsEnabled", HF_HUB_OFFLINE="1")
    assert not hub.requests


def test_a_dataset_that_is_not_there(hub, tmp_path):
    del hub.repos[DATASETS + "aps/super_glue"]
    _refused(hub, tmp_path, "'aps/super_glue' doesn't exist on the Hub or cannot be accessed")


def test_a_gated_dataset(hub, tmp_path):
    hub.repos[DATASETS + "aps/super_glue"].gated = True
    _refused(hub, tmp_path, "'aps/super_glue' is a gated dataset", "authenticated")


def test_an_overloaded_hub(hub, tmp_path):
    hub.faults.append(Fault("/api/datasets/", 503))
    _refused(hub, tmp_path, "503")


def test_a_damaged_file(hub, tmp_path, repositories):
    files = repositories["aps/super_glue"]
    hub.add(DATASETS + "aps/super_glue", files | dict.fromkeys([p for p in files if "validation" in p], b"PAR1, cut"))
    _refused(hub, tmp_path, "copa")
