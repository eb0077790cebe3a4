"""A sample of the fault bench (benchmarks/faults.py runs it in full), and the faults that need no chance."""

import errno
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
import transformers  # noqa: F401  forked children would import it again and again
from safetensors.torch import load_file, save_file

import faults
import mutants
from kbne_edit import Checks, Edit, Output, bake, fold, locate, verify
from kbne_edit.disk.dtypes import DTYPES, from_float, storage
from kbne_edit.disk.publishing import staged
from kbne_edit.errors import OutputError
from kbne_edit.locating import Settings
from kbne_edit.proofs.recovery import recover_factor
from mutants import DEMO, contents

SEED = 7


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    return mutants.ground(tmp_path_factory.mktemp("ground"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs") / "demo"
    shutil.copytree(DEMO, folder)
    return folder


def _wrong(verdicts):
    return {number: verdict for number, verdict in verdicts.items() if verdict[1].startswith("WRONG")}


@pytest.mark.slow
def test_mutated_inputs(ground):
    verdicts = faults.judged(lambda n, case: mutants.mutant(SEED, n, ground, case), range(192))
    assert len(verdicts) == 192 and not _wrong(verdicts)
    assert len({verdict.split(":")[0] for _, verdict in verdicts.values()}) == 3  # refused, right, found: all occur


@pytest.mark.slow
def test_mutated_tokenizers_and_configurations():
    verdicts = faults.judged(lambda n, case: mutants.model_mutant(SEED, n, case), range(24))
    assert len(verdicts) == 24 and not _wrong(verdicts)


def test_mutants_through_the_command_line(ground, tmp_path):
    for number in range(6):
        _, _, command = mutants.mutant(SEED, 3 * number, ground, tmp_path / str(number))
        assert faults.command_trial(command)[1] is None


@pytest.mark.parametrize("plain", [False, True], ids=["manifest", "recovered"])
def test_tampering_is_found(plain, ground):
    verdicts = faults.judged(faults.tamper_case(SEED, ground, plain), range(100))
    assert len(verdicts) == 100 and not _wrong(verdicts)


FIRST, SECOND = Edit("down", {1: {5: 2.0, 9: 2.0}}), Edit("down", {2: {7: 3.5}})


def _jobs(inputs):
    """{name: (work, prepare)}, both functions of a folder."""

    def old(folder):
        fold(inputs, FIRST, folder / "out")

    return {
        "locate": (
            lambda f: locate(str(inputs), f / "scores.safetensors", Settings(recipe="demo", questions=9)),
            lambda f: None,
        ),
        "bake": (
            lambda f: bake(str(inputs), f / "out", edit=FIRST, checks=Checks(behaviour=False, measure=False)),
            lambda f: None,
        ),
        "resharded": (
            lambda f: bake(
                str(inputs),
                f / "out",
                edit=FIRST,
                checks=Checks(behaviour=False, measure=False),
                output=Output(shard_size="200KB"),
            ),
            lambda f: None,
        ),
        "overwrite": (
            lambda f: bake(
                str(inputs),
                f / "out",
                edit=SECOND,
                checks=Checks(behaviour=False, measure=False),
                output=Output(overwrite=True),
            ),
            old,
        ),
    }


def _undisturbed(work, prepare, folder):
    folder.mkdir()
    prepare(folder)
    work(folder)
    return contents(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["locate", "bake", "resharded", "overwrite"])
def test_kills(name, inputs, tmp_path):
    """At every change of a file where there are few, at some of them in `locate`, and at a few random times."""
    work, prepare = _jobs(inputs)[name]
    whole, rng = _undisturbed(work, prepare, tmp_path / "whole"), random.Random(SEED)
    changes, seconds = faults.measured(work, tmp_path / "measured", prepare)
    moments = range(1, changes + 1) if name != "locate" else rng.sample(range(1, changes + 1), 4)
    strikes = [{"moment": m} for m in moments] + [{"seconds": rng.uniform(0, seconds)} for _ in range(4)]
    for number, strike in enumerate(strikes):
        assert faults.kill_trial(work, tmp_path / f"{number}", inputs, whole, prepare=prepare, **strike) is None, strike


@pytest.mark.parametrize("name", ["bake", "resharded", "overwrite"])
@pytest.mark.parametrize(
    "number, events", [(errno.ENOSPC, faults.FAILING), (errno.EIO, ("fsync",))], ids=["full disk", "fsync"]
)
def test_every_write_fails_once(name, number, events, inputs, tmp_path):
    work, prepare = _jobs(inputs)[name]
    whole = _undisturbed(work, prepare, tmp_path / "whole")
    changes, _ = faults.measured(work, tmp_path / "measured", prepare, events)
    assert changes >= 5
    for moment in range(1, changes + 1):
        fault = faults.disk_trial(work, tmp_path / f"{moment}", whole, moment, number, events, prepare)
        assert fault is None, (moment, fault)


@pytest.mark.parametrize("name", ["locate", "bake"])
def test_full_file_system(name, inputs, tmp_path):
    work, _ = _jobs(inputs)[name]
    for kilobytes in (8, 40, 400):
        ended, fault = faults.full_disk_trial(work, tmp_path / f"{kilobytes}", kilobytes)
        if ended is None:
            pytest.skip("this process may not mount a file system")
        assert fault is None
        if ended:
            break


def test_read_errors_name_the_file_that_was_read(inputs, tmp_path):
    work, _ = _jobs(inputs)["bake"]
    for moment in (1, 4, 12, 20, 30):
        fault = faults.read_error_trial(work, tmp_path / f"{moment}", inputs, moment)
        assert fault is None, (moment, fault)


def test_two_bakes_at_once(inputs, tmp_path):
    work = _jobs(inputs)["bake"][0]
    whole = _undisturbed(work, lambda folder: None, tmp_path / "whole")
    for turn in range(8):
        assert faults.race(work, tmp_path / f"{turn}", turn * 0.003, whole) is None


def test_an_output_that_came_in_between_is_not_replaced(tmp_path):
    """Two runs found the name free; the second asks again once it holds the lock."""
    with staged(tmp_path / "out") as part:
        (part / "a").write_text("first")
    with pytest.raises(OutputError, match="exists"), staged(tmp_path / "out"):
        pass
    assert contents(tmp_path) == {"out/a": b"first"}


def test_a_replacement_that_was_killed_half_way_is_undone(inputs, tmp_path):
    fold(inputs, FIRST, tmp_path / "out")
    before = contents(tmp_path)
    os.rename(tmp_path / "out", tmp_path / ".out.kbne-old")  # what a kill between the two renames leaves
    with pytest.raises(OutputError, match="exists"):
        fold(inputs, SECOND, tmp_path / "out")
    assert contents(tmp_path) == before


def test_overwrite_replaces_checkpoints_only(inputs, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="is not a checkpoint"):
        fold(inputs, FIRST, tmp_path / "out", overwrite=True)
    assert contents(tmp_path) == {"out/thesis.txt": b"years of work"}


@pytest.mark.parametrize(
    "case, message",
    [("read-only target", "cannot write"), ("unreadable input", "cannot read"), ("unreadable folder", "cannot read")],
)
def test_permissions(case, message, inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "base")
    (tmp_path / "base" / "extra").mkdir()
    (tmp_path / "target").mkdir()
    FIRST.save(tmp_path / "edit.json")
    locked = {
        "read-only target": "target",
        "unreadable input": "base/tokenizer.json",
        "unreadable folder": "base/extra",
    }
    (tmp_path / locked[case]).chmod(0o555 if "target" in case else 0)
    command = [
        "bake",
        "--in",
        tmp_path / "base",
        "--edit",
        tmp_path / "edit.json",
        "--out",
        tmp_path / "target" / "out",
    ]
    status, fault, error = faults.command_trial([*command, "--no-behaviour"])
    (tmp_path / locked[case]).chmod(0o755)
    if status == 0 and os.geteuid() == 0:
        pytest.skip("permissions do not hold for this process")
    assert status == 2 and fault is None and message in error
    assert not list((tmp_path / "target").iterdir())


@pytest.mark.slow
def test_code_of_a_checkpoint_is_carried_over_and_never_run(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "base")
    for name, classes in (
        ("config.json", ["AutoConfig", "AutoModelForCausalLM"]),
        ("tokenizer_config.json", ["AutoTokenizer"]),
    ):
        path = tmp_path / "base" / name
        code = {c: ["own.Own", None] if c == "AutoTokenizer" else "own.Own" for c in classes}
        path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": code}))
    (tmp_path / "base" / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    command = ["bake", "--in", tmp_path / "base", "--recipe", "demo", "--questions", 9, "--out", tmp_path / "out"]
    status, fault, error = faults.command_trial(command)
    assert status == 0 and fault is None, error
    assert (tmp_path / "out" / "own.py").read_bytes() == (tmp_path / "base" / "own.py").read_bytes()
    config = tmp_path / "base" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tokenizer_class": "Own"}))  # nothing else fits
    status, fault, _ = faults.command_trial([*command[:-1], tmp_path / "other"])
    assert status in (0, 2) and fault is None and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("factor", [2.0, 3.5, -1.25, 0.0, 1.2345, 0.123456789, 1e-3, 1.0001, 17.3])
@pytest.mark.parametrize("kind", ["BF16", "F16", "F32"])
def test_a_recovered_factor_gives_the_stored_bits(kind, factor):
    rng = np.random.default_rng(int(1000 * abs(factor)))
    x = from_float(rng.standard_normal(4096).astype(np.float32), kind)
    wide = (x.astype(np.uint32) << 16).view(np.float32) if kind == "BF16" else x.astype(np.float32)
    y = from_float(wide * np.float32(factor), kind)
    got = recover_factor(x, y, kind)
    assert got is not None and from_float(wide * np.float32(got), kind).tobytes() == y.tobytes()
    assert len(repr(abs(got))) <= len(
        repr(abs(factor))
    )  # as short as the person's, or the same bits from a shorter one
    spoilt = y.copy()
    spoilt.view(np.uint8)[6000] ^= 1
    assert recover_factor(x, spoilt, kind) is None
    assert storage(kind, "x").itemsize == x.itemsize and (kind == "BF16" or DTYPES[kind].numpy == x.dtype)


def test_a_scaled_column_with_one_other_weight_is_found(inputs, tmp_path):
    shutil.copytree(inputs, tmp_path / "other")
    weights = load_file(inputs / "model.safetensors")
    column = weights["model.layers.1.mlp.down_proj.weight"][:, 7]
    column.copy_((column.float() * 1.2345).to(column.dtype))
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    report = verify(inputs, tmp_path / "other", behaviour=False)
    assert report.ok and report.edit.num_neurons == 1
    column[3] = torch.nextafter(column[3], column[3] * 2)
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    Edit("down", report.edit.factors).save(tmp_path / "edit.json")
    assert not verify(inputs, tmp_path / "other", edit=Edit.load(tmp_path / "edit.json"), behaviour=False).ok
    status, _, error = faults.command_trial(["verify", "--in", inputs, "--baked", tmp_path / "other", "--no-behaviour"])
    assert status == 2 and "no neuron" in error
