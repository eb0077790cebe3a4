"""The card of a baked directory: valid metadata, bytes that depend on the manifest alone, the base's card kept."""

import json
import re
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from hub import card_faults
from kbne_edit import Checks, Edit, bake, fold, revert, verify
from kbne_edit.attribution.answers import Answers, AttributionSummary, Tally
from kbne_edit.disk.manifest import Manifest, Origin, RecipeRecord
from kbne_edit.errors import CheckpointError
from kbne_edit.evaluation.cost import Continuation, Cost
from kbne_edit.evaluation.effect import Change, Effect, RandomDraws
from kbne_edit.evaluation.measures import FigureChange, QuickMeasure
from kbne_edit.evaluation.verdict import Part, Verdict
from kbne_edit.hub.licences import notices
from kbne_edit.proofs.outcome import FileProof, Proofs
from kbne_edit.reporting.card import build
from kbne_edit.selection.summary import SelectionSummary, Shared
from kbne_edit.statistics import Interval
from tiny import tiny_model

EDIT = Edit("down", {1: {5: 2.0, 9: 2.0}, 2: {1: 4.0}})
CARDS = {
    "plain": b"---\nlicense: mit\nlanguage: [en, no]\ntags: [chat, base_model:org/x]\nbase_model: org/x\n---\n# Base\n",
    "named": b"---\nlicense: other\nlicense_name: llama4\nlicense_link: LICENSE\npipeline_tag: any-to-any\n---\n",
    "windows": b"\xef\xbb\xbf---\r\nlicense: gemma\r\nlanguage: English\r\n---\r\n# Base\r\n",
    "no metadata": b"# Base\n",
    "malformed": b"---\nlicense: [mit\n---\n# Base\n",
    "list": b"---\n- a\n---\n",
    "odd values": b"---\nlicense: [mit]\ntags: {a: 1}\nlanguage: 3\npipeline_tag: 5\n---\n",
    "latin-1": "---\nlicense: mit\n---\nÜbung\n".encode("latin-1"),
    "none": None,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    tiny_model("llama").save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _base(weights, folder, card):
    folder.mkdir(parents=True)
    for name, data in (weights | ({"README.md": card} if card is not None else {})).items():
        (folder / name).write_bytes(data)
    return folder


def _bake(base, out):
    bake(str(base), out, edit=EDIT, checks=Checks(behaviour=False))
    return json.loads((out / "kbne_edit.json").read_text())


def _files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CARDS)
def test_valid_and_undone(case, weights, tmp_path):
    base = _base(weights, tmp_path / "base", CARDS[case])
    _bake(base, tmp_path / "out")
    assert not card_faults(ModelCard.load(tmp_path / "out" / "README.md").data.to_dict())
    assert _files(tmp_path / "out").get("README.base.md") == CARDS[case]
    assert verify(base, tmp_path / "out", behaviour=False).ok
    revert(tmp_path / "out", tmp_path / "again")
    assert _files(tmp_path / "again") == _files(base)


def test_what_is_carried_over_from_the_base(weights, tmp_path):
    data = {}
    for case in ("plain", "named", "windows"):
        _bake(_base(weights, tmp_path / case / "base", CARDS[case]), tmp_path / case / "out")
        data[case] = ModelCard.load(tmp_path / case / "out" / "README.md")
    plain = data["plain"].data.to_dict()
    assert (plain["license"], plain["language"], plain["tags"][0]) == ("mit", ["en", "no"], "chat")
    assert "base_model" not in plain and not any(tag.startswith("base_model:") for tag in plain["tags"])
    named = data["named"].data.to_dict()
    assert [named[key] for key in ("license", "license_name", "license_link", "pipeline_tag")] == [
        "other",
        "llama4",
        "LICENSE",
        "any-to-any",
    ]
    assert "Built with Llama." in data["named"].text and "restrictions of use" in data["windows"].text


def test_it_says_what_the_run_did_and_did_not_do(weights, tmp_path):
    _bake(_base(weights, tmp_path / "base", None), tmp_path / "out")
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert "3 feed-forward neurons in 2 layers" in text and "2 factors, 2 to 4" in text
    assert "| 1 | 2 |" in text and "| 2 | 1 |" in text
    assert "did not locate them" in text and "was not put to the proof" in text
    assert "Whether this model shows less bias than its base: it was not measured" in text


def _manifest(**parts):
    """A manifest as a run writes it."""
    summary = {key: value.to_dict() for key, value in parts.items() if hasattr(value, "to_dict")}
    summary |= {"measures": parts["measures"]} if "measures" in parts else {}
    proofs = Proofs(FileProof(EDIT, "manifest", 3, 1, 2))
    about = {"source": Origin("org/base", "abc"), "recipe": RecipeRecord("demo", "0" * 64)}
    return Manifest(EDIT, {}, summary=summary, proofs=proofs.to_dict(), **about | parts.get("about", {})).as_read()


def test_it_says_that_held_out_controls_use_the_neurons_too():
    result = SelectionSummary("paper", 8, 0.1, (0,), {}, {}, 5, 0, (Shared(1, 8), Shared(2, 7)))
    reply = build(_manifest(selection=result), {})
    assert "none of the edit's is" in reply and "20% are among as many that this half uses most" in reply
    reply = build(_manifest(selection=replace(result, unseen=(Shared(0, 8), Shared(0, 7)))), {})
    assert "uses most" not in reply


def _effect(aim="balance"):
    draws = RandomDraws(24, Interval(0, -1, 1), Interval(0, -1, 1), Interval(-0.1, -0.2, -0.05), 12, 0, 24, -0.01, 0.02)
    lower = Interval(-0.0123, -0.02, -0.01)
    shares = Change(0.7, 0.6), Change(0.31, 0.25), Change(0.42, 0.33)
    return Effect(aim, 24, 12, *shares, Interval(-0.0456, -0.06, -0.03), lower, draws)


def _cost(kl=0.01):
    flat = Interval(1.0, 1.0, 1.01)
    items = (Continuation("probe", "a", "b", "c"),)
    return Cost(
        "package", 64, Interval(kl, kl, kl), Interval(20, 19, 21), Interval(20, 19, 21), flat, continuations=items
    )


@pytest.mark.parametrize("aim, value, change", [("balance", "0.33", "-0.0123"), ("avoid", "0.25", "-0.0456")])
def test_tag_and_metrics_need_a_verdict_that_passes(aim, value, change):
    """Of what is to be avoided, the metric is the signed score and its signed change."""
    card = ModelCard(build(_manifest(effect=_effect(aim), cost=_cost()), {}))
    (index,) = card.data.to_dict()["model-index"]
    metrics = {entry["type"]: entry["value"] for entry in index["results"][0]["metrics"]}
    names = (
        ("mean_score", "mean_score_change") if aim == "avoid" else ("mean_absolute_score", "mean_absolute_score_change")
    )
    assert [metrics[name] for name in names] == [float(value), float(change)]
    assert "bias-mitigation" in card.data.tags
    for cost in (_cost(kl=0.5), None):  # an effect that costs too much, or of which nobody knows what it costs
        reply = build(_manifest(effect=_effect(aim), cost=cost), {})
        assert "bias-mitigation" not in reply and "model-index" not in reply


def test_use_cost_and_contact_are_said():
    reply = build(_manifest(effect=_effect(), cost=_cost()), {})
    assert "## Use" in reply and "Out of scope: decisions about people" in reply and "Community tab" in reply
    assert "KL from the base 0.01 nats per token" in reply and "1 of 1 greedy continuations change" in reply
    passed = Verdict(*[Part("PASS", "a reason")] * 5)
    assert "Research on this edit" in reply and "Research on this edit" not in build(_manifest(verdict=passed), {})


def test_decisions_and_associations_stand_in_the_card():
    gap = FigureChange("largest gap", "nats", 0.1234, 0.0567, Interval(-0.0667, -0.08, -0.05))
    of_group = FigureChange("woman - man", "nats", 0.1, 0.2, Interval(0.1, 0.0, 0.2))
    measures = (QuickMeasure("decisions", "en|`x`", 12, (gap, of_group)),)  # a manifest's words are not markup
    reply = build(_manifest(effect=_effect(), cost=_cost(), measures=[m.to_dict() for m in measures]), {})
    assert (
        "| decisions (en&#124;&#96;x&#96;, 12) | largest gap, nats | 0.1234 | 0.0567 | -0.067 | -0.08 to -0.05 |"
        in reply
    )
    assert "woman - man" not in reply and "Further figures" not in reply
    assert "Decisions about people of different groups" not in build(_manifest(effect=_effect(), cost=_cost()), {})


def test_not_measured_never_reads_like_no_effect():
    reply = build(_manifest(), {})
    assert "That is not “no effect”" in reply and "No effect" not in reply and "| NOT MEASURED | Is there less" in reply
    assert "Its cost was not measured" in build(_manifest(effect=_effect()), {})
    assert "Its effect on bias was not measured" in build(_manifest(cost=_cost()), {})


def test_a_constant_answer_is_warned_of():
    tallies = {"yes": Tally(9, 9), "no": Tally(0, 9)}
    result = Answers(Tally(9, 18), Tally(9, 18), tallies, {}, Interval(0.5, 0.4, 0.6), "yes", None)
    reply = build(_manifest(attribution=AttributionSummary(result, 0.01, 4.0)), {})
    assert "> Caution: the base does no better than one answer (yes) to every question" in reply
    result = replace(result, constant=None)
    assert "Caution" not in build(_manifest(attribution=AttributionSummary(result, 0.01, 4.0)), {})


HOSTILE = "[x](javascript:alert(1)) <img src=x onerror=alert(2)> `|` ![y](//evil) \n# Heading\n<script>"


@pytest.mark.parametrize("where", ["recipe", "source", "commit", "tool", "licence", "link", "answer", "reason"])
def test_names_from_files_are_text_and_nothing_else(where):
    """Rendered by a Markdown library: no link, image, script or heading comes from a name."""
    markdown = pytest.importorskip("markdown")
    about = {
        "recipe": {"recipe": RecipeRecord(HOSTILE, "0" * 64)},
        "source": {"source": Origin(HOSTILE)},
        "commit": {"source": Origin(HOSTILE, HOSTILE)},
        "tool": {"tool": HOSTILE},
    }.get(where, {})
    metadata = {"licence": {"license": HOSTILE}, "link": {"license": "other", "license_link": "javascript:alert(1)"}}
    tallies = {HOSTILE if where == "answer" else "yes": Tally(9, 9)}
    result = Answers(Tally(9, 18), Tally(9, 18), tallies, {}, Interval(0.5, 0.4, 0.6), next(iter(tallies)), None)
    parts = {"attribution": AttributionSummary(result, 0.01, 4.0), "effect": _effect(), "about": about}
    if where == "reason":
        parts["verdict"] = Verdict(*[Part("NO EVIDENCE", HOSTILE)] * 5)
    card = ModelCard(build(_manifest(**parts), metadata.get(where, {})))
    plain = ModelCard(build(_manifest(**parts | {"about": {}}), {}))
    shown = markdown.markdown(card.text, extensions=["tables", "fenced_code"])
    assert not re.search(r"<(script|img)|href=\"(javascript|//)", shown)
    assert shown.count("<h2>") == plain.text.count("\n## ") and shown.count("<h1>") == 1
    assert "javascript:" not in str(card.data.to_dict().get("license_link", ""))


def test_the_same_input_gives_the_same_card_wherever_it_lies(weights, tmp_path):
    made = []
    for place in ("here", "there"):
        _bake(_base(weights, tmp_path / place / "base", CARDS["plain"]), tmp_path / f"out-{place}")
        made.append(_files(tmp_path / f"out-{place}"))
    assert made[0] == made[1]
    assert str(tmp_path).encode() not in b"".join(made[0][name] for name in ("README.md", "kbne_edit.json"))


def test_a_base_that_was_baked_itself(weights, tmp_path):
    _bake(_base(weights, tmp_path / "base", CARDS["plain"]), tmp_path / "once")
    _bake(tmp_path / "once", tmp_path / "twice")
    assert (tmp_path / "twice" / "README.base.md").read_bytes() == CARDS["plain"]
    assert verify(tmp_path / "once", tmp_path / "twice", behaviour=False).ok
    revert(tmp_path / "twice", tmp_path / "again")
    assert _files(tmp_path / "again") == {
        name: data for name, data in _files(tmp_path / "once").items() if not name.startswith("kbne_")
    }


@pytest.mark.parametrize("name", ["README.md", "README.base.md"])
@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"# x"), lambda path: path.unlink()])
def test_verify_finds_a_card_that_was_changed(name, spoil, weights, tmp_path):
    base = _base(weights, tmp_path / "base", CARDS["plain"])
    _bake(base, tmp_path / "out")
    spoil(tmp_path / "out" / name)
    faults = verify(base, tmp_path / "out", behaviour=False).faults
    assert len(faults) == 1 and ("README" in faults[0]), faults


def test_what_the_hub_adds_is_no_fault(weights, tmp_path):
    base = _base(weights, tmp_path / "base", None)
    _bake(base, tmp_path / "out")
    (tmp_path / "out" / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    assert verify(base, tmp_path / "out", behaviour=False).ok
    revert(tmp_path / "out", tmp_path / "again")
    assert _files(tmp_path / "again") == _files(base)


@pytest.mark.parametrize("origin", ["../escaped.md", "/tmp/escaped.md", "sub/x.md", "..", 3])
def test_a_manifest_cannot_name_a_place_outside(origin, weights, tmp_path):
    manifest = _bake(_base(weights, tmp_path / "base", CARDS["plain"]), tmp_path / "out")
    manifest["files"]["README.base.md"]["base"] = origin
    (tmp_path / "out" / "kbne_edit.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="damaged"):
        revert(tmp_path / "out", tmp_path / "again")
    assert not (tmp_path / "escaped.md").exists() and not (tmp_path / "again").exists()


def test_fold_alone_writes_no_card(weights, tmp_path):
    fold(_base(weights, tmp_path / "base", CARDS["plain"]), EDIT, tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == CARDS["plain"]


@pytest.mark.parametrize(
    "metadata, name, said",
    [
        ({"license": "llama3.1"}, "org/debiased", ["“Built with Llama”", "debiased does not begin with “Llama”"]),
        ({"license": "other", "license_name": "llama4"}, "org/my-Llama", ["“Built with Llama”", "does not begin with"]),
        ({"license": "llama3.2"}, "org/Llama-debiased", ["“Built with Llama”"]),
        ({"license": "llama3"}, "org/Llama-debiased", ["“Built with Meta Llama 3”", "does not begin with “Llama 3”"]),
        ({"license": "llama3"}, "org/Llama-3-debiased", ["“Built with Meta Llama 3”"]),
        ({"license": "gemma"}, "org/debiased", ["restrictions of use"]),
        ({"license": "apache-2.0"}, "org/debiased", []),
        ({"license": ["mit"]}, "org/debiased", ["names no licence"]),
        ({}, "org/debiased", ["names no licence"]),
    ],
)
def test_licences_are_pointed_out(metadata, name, said):
    result = notices(metadata, name)
    assert len(result) == len(said) and all(part in line for part, line in zip(said, result, strict=True)), result
