"""The README from top to bottom, as a new user types it, on the demo where it says MODEL.

The two commands that set everything up are run by CI itself; installing and the shell's completion are tested there and
in test_commands.py.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import bench_data
from kbne_edit import Controls
from kbne_edit.commands import cli
from kbne_edit.hub.source import DEMO

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
ELSEWHERE = ("python3 -m venv ", "pip install ", "eval ")
NUMBER = re.compile(r"([-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?)")


def _run(line):
    assert cli.main(shlex.split(line)[1:], prog_name="kbne-edit", standalone_mode=False) in (None, 0), line


def _alike(shown, printed):
    """The same words and whole numbers; decimals may differ by two units of the last digit from machine to machine."""
    a, b = NUMBER.split(shown), NUMBER.split(printed)
    if a[::2] != b[::2]:
        return False
    for x, y in zip(a[1::2], b[1::2], strict=True):
        mantissa, _, exponent = x.partition("e")
        digits = len(mantissa.partition(".")[2])
        unit = 10.0 ** (int(exponent or 0) - digits) if digits else 0
        if abs(float(x) - float(y)) > 2.001 * unit:
            return False
    return True


def test_numbers_are_compared_as_printed():
    assert _alike("0.1535 to -0.02, p 1.2e-03", "0.1537 to -0.01, p 1.4e-03")
    assert not _alike("0.1535", "0.1538") and not _alike("17 neurons", "18 neurons") and not _alike("1 a", "1 b")


@pytest.mark.slow
def test_each_block_in_turn(tmp_path, monkeypatch, capsys):
    """In one folder, and in the README's order, but what is shown before what is only typed: examples write over it."""
    data = bench_data.write(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for kind, text in sorted(BLOCKS, key=lambda block: not block[1].startswith("$ ")):
        if text.startswith("$ "):
            _session(*text.splitlines(), capsys=capsys)
        elif kind == "bash":
            for line in text.splitlines():
                if not line.startswith(ELSEWHERE):
                    _typed(_ready(line.split("  #")[0], data))
        elif kind == "python":
            _python(text, f"data={str(data)!r}")


def _session(command, *shown, capsys):
    """What a command prints is what is shown; … stands for lines that are left out."""
    capsys.readouterr()
    _run(command.removeprefix("$ "))
    printed = re.sub(r"\S*/(kbne-edit|python)\S* ", r"\1 ", capsys.readouterr().out).splitlines()
    place = 0
    for part in "\n".join(shown).split("…"):
        lines = part.strip("\n").splitlines()
        ends = (
            i + len(lines)
            for i in range(place, len(printed) - len(lines) + 1)
            if all(map(_alike, lines, printed[i : i + len(lines)]))
        )
        place = next(ends, None)
        assert place is not None, f"{part}\nis not in\n" + "\n".join(printed)
    assert shown[-1] == "…" or place == len(printed)


def _ready(line, data):
    """The line with names that exist here, and shortened where it would take minutes or the network."""
    for name, value in (("Qwen/Qwen2.5-0.5B-Instruct", "demo"), ("MODEL", "demo"), ("DIR", str(data)), ("ORG", "org")):
        line = line.replace(name, value)
    verb = line.split()[1]
    if verb in ("evaluate", "tune") and "--data" not in line:
        line += f" --data {data}"
    short = {"tune": " --trials 2 --draws 1 --margin 45", "evaluate": " --draws 1", "push": " --dry-run"}
    return line + short.get(verb, "")


def _typed(line):
    if "gate.safetensors" in line and not Path("gate.safetensors").exists():
        _run("kbne-edit locate --in demo --questions 9 --site gate --out gate.safetensors")
    if out := re.search(r"--out (\./\S+)", line):  # most examples write to ./debiased
        shutil.rmtree(out[1], ignore_errors=True)
    if not line.startswith("torchrun "):
        return _run(line)
    Path("scores.safetensors").unlink()
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *shlex.split(line)[1:]]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    subprocess.run(words, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": paths})
    assert Path("scores.safetensors").is_file()


def _python(block, where):
    from transformers import AutoModelForCausalLM

    for name, value in (
        ("{11: {402: 2.0, 77: 2.0}}", "{1: {102: 2.0, 77: 2.0}}"),
        ('"path/to/base"', repr(str(DEMO))),
        ('"path/to/out"', '"folded"'),
        ('"copa"', '"bbq"'),
        ("limit=200)", f"limit=5, {where}), controls=Controls(draws=1)"),
    ):
        assert name in block
        block = block.replace(name, value)
    space = {"Controls": Controls, "model": AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)}
    exec(compile(block, "README", "exec"), space)
    assert space["proofs"].ok and space["edit"].num_neurons == 2
    assert {"crows_pairs", "bbq"} <= set(space["result"].to_dict()["tasks"])
