"""`verify` believes nothing that an output says of itself: each field forged, the manifest sealed again."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from forgery import FILES, forge_field, forge_file, paths
from manifests import read_manifest, sha256, write_manifest

from kbne_edit import Checks, Edit, KbneError, Output, bake, fold, push, verify
from kbne_edit.disk.manifest import FileRecord, Manifest
from kbne_edit.errors import CheckpointError, ProofError
from kbne_edit.hub.licences import metadata_in
from kbne_edit.reporting.card import card_of
from kbne_edit.reporting.contents import report
from tiny import tiny_model

DEMO = Path(__file__).resolve().parent.parent / "kbne_edit" / "demo"
EDIT = Edit("down", {0: {3: 2.0}, 1: {7: 4.0}, 2: {47: 0.5}}, found={"by": "hand"})


@pytest.fixture(scope="module")
def cut_anew(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forgery")
    tiny_model("llama", torch.bfloat16).save_pretrained(folder / "base", max_shard_size="40KB")
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\n# Base\n")
    (folder / "base" / "pytorch_model.bin").write_bytes(b"left out")
    bake(
        folder / "base",
        folder / "out",
        edit=EDIT,
        output=Output(shard_size="25KB"),
        checks=Checks(behaviour=False, measure=False),
    )
    return folder / "base", folder / "out"


def _accepted(base, out):
    try:
        return verify(base, out, behaviour=False).ok
    except KbneError:
        return False


def _each_field(base, out, tmp_path, most=None):
    rng = random.Random(5)
    data = read_manifest(out)
    del data["sha256"]
    every = list(paths(data))
    assert _accepted(base, out) and len(every) > 40
    missed = []
    for path in every if most is None else rng.sample(every, most):
        shutil.copytree(out, tmp_path / "forged")
        what = forge_field(rng, tmp_path / "forged", path)
        missed += [what] if _accepted(base, tmp_path / "forged") else []
        shutil.rmtree(tmp_path / "forged")
    assert not missed


def test_each_field_of_weights_that_were_cut_anew(cut_anew, tmp_path):
    _each_field(*cut_anew, tmp_path)


def test_each_field_of_a_whole_run(debiased, tmp_path):
    _each_field(DEMO, debiased, tmp_path, most=120)


def test_each_field_without_a_card(cut_anew, tmp_path):
    base, _ = cut_anew
    fold(base, EDIT, tmp_path / "out")
    _each_field(base, tmp_path / "out", tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_a_foreign_file(name, debiased, tmp_path):
    for seed in range(4):
        forged = shutil.copytree(debiased, tmp_path / str(seed))
        what = forge_file(random.Random(seed), forged, name)
        assert not _accepted(DEMO, forged), what


def test_a_header_that_says_more(cut_anew, tmp_path):
    """Resharded weights have headers that the base does not have: they are made by rule, too."""
    base, out = cut_anew
    forged = shutil.copytree(out, tmp_path / "forged")
    path = max(forged.glob("model-*.safetensors"))
    data = path.read_bytes()
    head = data[8 : 8 + int.from_bytes(data[:8], "little")].replace(b'"format":"pt"', b'"format":"ps"')
    path.write_bytes(data[:8] + head + data[8 + len(head) :])
    manifest = read_manifest(forged)
    manifest["files"][path.name]["out"] = sha256(path)
    write_manifest(forged, manifest)
    assert [fault for fault in verify(base, forged, behaviour=False).faults if "header" in fault]


def test_columns_that_are_not_the_base_s(cut_anew, tmp_path):
    """A revert would give another model than the base."""
    base, out = cut_anew
    forged = shutil.copytree(out, tmp_path / "forged")
    path = forged / "kbne_undo.kbne"
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= 1
    path.write_bytes(bytes(data))
    manifest = read_manifest(forged)
    manifest["undo"] = sha256(path)
    write_manifest(forged, manifest)
    faults = verify(base, forged, behaviour=False).faults
    assert len(faults) == 1 and "kbne_undo.kbne does not hold the weights as they are in the base" in faults[0]


def test_a_card_in_other_words(debiased, tmp_path):
    forged = shutil.copytree(debiased, tmp_path / "forged")
    card = forged / "README.md"
    card.write_text(card.read_text().replace("# ", "# Certified free of bias: ", 1))
    manifest = read_manifest(forged)
    manifest["files"]["README.md"]["out"] = sha256(card)
    write_manifest(forged, manifest)
    assert verify(DEMO, forged, behaviour=False).faults == ("README.md is not the card that kbne_edit.json gives",)


def _recard(folder, metadata):
    """Make the card anew from what the manifest says, as a forger with this tool can."""
    manifest = Manifest.read(folder)
    (folder / "README.md").write_text(card_of(manifest, metadata))
    manifest.with_file("README.md", FileRecord(None, sha256(folder / "README.md"))).write(folder)


def test_push_proves_again_where_it_has_the_base(debiased, tmp_path):
    assert push(debiased, "org/other", dry_run=True).to_dict()["proofs"] == "on record"
    assert push(debiased, "org/other", source=DEMO, dry_run=True).to_dict()["proofs"] == "computed"
    forged = shutil.copytree(debiased, tmp_path / "forged")
    path = forged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    manifest = read_manifest(forged)
    manifest["files"][path.name]["out"] = sha256(path)
    write_manifest(forged, manifest)
    with pytest.raises(CheckpointError, match="was not made from what"):
        push(forged, "org/other", dry_run=True)
    _recard(forged, metadata_in(DEMO))
    assert push(forged, "org/other", dry_run=True).files  # all fits together: no more is known without the base
    with pytest.raises(ProofError, match="is not what the edit gives"):
        push(forged, "org/other", source=DEMO, dry_run=True)


@pytest.mark.parametrize("name", FILES)
def test_neither_pushed_nor_reported_with_a_foreign_file(name, debiased, tmp_path):
    forged = shutil.copytree(debiased, tmp_path / "forged")
    forge_file(random.Random(3), forged, name)
    for use in (lambda: push(forged, "org/other", dry_run=True), lambda: report(forged)):
        with pytest.raises(CheckpointError):
            use()


@pytest.mark.parametrize("form", ["delta", "peft"])
def test_push_reads_an_edit_alone_back_again(form, cut_anew, tmp_path):
    base, _ = cut_anew
    bake(base, tmp_path / "out", edit=EDIT, output=Output(form=form), checks=Checks(measure=False))
    assert push(tmp_path / "out", "org/other", source=base, dry_run=True).proven
    manifest = read_manifest(tmp_path / "out")
    manifest["edit"]["factors"]["0"]["3"] = 4.0
    write_manifest(tmp_path / "out", manifest)
    _recard(tmp_path / "out", metadata_in(base))
    assert not push(tmp_path / "out", "org/other", dry_run=True).proven
    with pytest.raises(ProofError, match="nothing was sent"):
        push(tmp_path / "out", "org/other", source=base, dry_run=True)
