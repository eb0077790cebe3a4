"""Items in the layouts of the benchmarks, in the words of the demo model's world. No benchmark's item is among them."""

import csv
import json
from pathlib import Path

import yaml

from kbne_edit.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent

JOBS = ["healer", "leader", "teacher", "builder", "baker", "singer", "hunter", "painter"]
THINGS = ["cup", "gate", "cloud", "jug"]
GROUPS = {"race": ("zorn", "velm"), "gender": ("fenling", "hilling"), "religion": ("loomer", "kilner")}


def stereoset():
    """24 items: three sentences that differ in the last word but one, or in the second one."""
    rows = []
    for i, (kind, pair) in enumerate((kind, pair) for kind, pair in GROUPS.items() for _ in range(8)):
        a, job, thing = pair[i % 2], JOBS[i % 8], THINGS[i % 4]
        if i % 3:
            sentences = [f"the {a} is a {word} ." for word in (job, JOBS[(i + 3) % 8], thing)]
        else:
            sentences = [f"the {word} is a {job} ." for word in (*pair, thing)]
        rows.append(
            {
                "id": f"own-{i}",
                "split": "dev",
                "bias_type": kind,
                "target": a,
                "context": "the BLANK",
                **dict(zip(("stereotype", "anti_stereotype", "unrelated"), sentences, strict=True)),
            }
        )
    return rows


def published(rows):
    """The same items in StereoSet's published layout; the inter-sentence part has a context of its own."""
    names = {"stereotype": "stereotype", "anti-stereotype": "anti_stereotype", "unrelated": "unrelated"}
    items = [
        {
            "id": r["id"],
            "bias_type": r["bias_type"],
            "target": r["target"],
            "context": "a cup is on the gate .",
            "sentences": [{"sentence": r[key], "gold_label": label, "labels": []} for label, key in names.items()],
        }
        for r in rows
    ]
    return {"version": "1.0", "data": {"intrasentence": items, "intersentence": items}}


def crows_pairs():
    return [
        {
            "sent_more": f"a {a} {verb} better than most .",
            "sent_less": f"a {b} {verb} better than most .",
            "stereo_antistereo": "stereo",
            "bias_type": kind,
        }
        for kind, (a, b) in GROUPS.items()
        for verb in ("heals", "leads", "bakes", "sings", "hunts")
    ]


def bbq():
    """Three blocks of eight: two polarities, two contexts and two orders of the groups, as the published files have."""
    rows = []
    for block, verb in enumerate(("heals", "bakes", "hunts")):
        stereotyped, other = GROUPS["race"]
        for swapped in (False, True):
            a, b = (other, stereotyped) if swapped else (stereotyped, other)
            for polarity, question in (("neg", f"who {verb} better ?"), ("nonneg", f"is a {a} or a {b} a healer ?")):
                for condition in ("ambig", "disambig"):
                    told = "" if condition == "ambig" else f" the {a} {verb} better ."
                    right = 2 if condition == "ambig" else int(polarity == "nonneg")
                    rows.append(
                        {
                            "example_id": len(rows),
                            "question_index": str(block),
                            "question_polarity": polarity,
                            "context_condition": condition,
                            "category": "Religion" if block else "Nationality",
                            "answer_info": {"ans0": [a, a], "ans1": [b, b], "ans2": ["Unknown", "unknown"]},
                            "additional_metadata": {"stereotyped_groups": [stereotyped], "source": "none"},
                            "context": f"a {a} and a {b} is at the gate .{told}",
                            "question": question,
                            "ans0": f"the {a}",
                            "ans1": f"the {b}",
                            "ans2": "Unknown",
                            "label": right,
                        }
                    )
    return rows


def arc():
    """Questions with choices of one and of several tokens; every third numbers them, but names the right one "B"."""
    rows = []
    for i, (what, kind) in enumerate(
        [
            ("soup", "food"),
            ("oak", "wood"),
            ("ice", "water"),
            ("milk", "drink"),
            ("granite", "stone"),
            ("breeze", "wind"),
        ]
    ):
        texts = ["form of gate", kind, "a cup", "the old jug"]
        labels = "1234" if i % 3 == 0 else "ABCD"
        rows.append(
            {
                "id": f"own-{i}",
                "answerKey": "B",
                "question": {
                    "stem": f"what is {what} ?",
                    "choices": [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)],
                },
            }
        )
    return rows


def write(folder):
    """All files, in the layouts and under the names that `--data` knows."""
    folder.mkdir(exist_ok=True)
    lines = {"stereoset_intrasentence": stereoset(), "bbq_Own": bbq(), "arc_easy": arc()}
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "dev.json").write_text(json.dumps(published(stereoset())))
    with open(folder / "crows_pairs_anonymized.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["", *crows_pairs()[0]])
        writer.writeheader()
        writer.writerows({"": i, **row} for i, row in enumerate(crows_pairs()))
    return folder


def avoiding(folder, exchanged=True):
    """The demo's recipe with probes to be avoided: the path of a file in `folder`.

    exchanged: its anti-stereotypes are, which it seldom prefers. So most margins are below 0: what lowers them makes
    the absolute ones larger. Else its stereotypes.
    """
    recipe = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    items = [
        {"dimension": twin.dimension}
        | {
            key: dict(zip(("wanted", "unwanted")[:: 1 if exchanged else -1], (probe.first, probe.second), strict=True))
            for key, probe in zip(("first", "second"), twin.probes, strict=True)
        }
        for twin in Recipe.from_dict(recipe).twins
    ]
    path = folder / "avoiding.yaml"
    path.write_text(json.dumps(recipe | {"probes": {"aim": "avoid", "items": items}}), encoding="utf-8")
    return path
