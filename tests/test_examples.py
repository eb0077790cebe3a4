"""The examples run from top to bottom, and show what they say."""

import json
import runpy
from pathlib import Path

import pytest

from kbne_edit.progress import show_progress

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name):
    """What the cells of a notebook leave behind; the value of each last line is kept under "shown"."""
    cells = json.loads((EXAMPLES / name).read_text(encoding="utf-8"))["cells"]
    space = {"shown": []}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"] and cell["execution_count"] is None  # outputs are not committed
            *lines, last = "".join(cell["source"]).splitlines()
            exec(compile("\n".join(lines), name, "exec"), space)
            if last.startswith((" ", ")")) or " = " in last or last.startswith(("from ", "import ", "for ")):
                exec(compile("\n".join([*lines, last]) if last.startswith((" ", ")")) else last, name, "exec"), space)
            else:
                space["shown"].append(eval(compile(last, name, "eval"), space))
    show_progress(False)
    return space


def test_first_edit():
    space = run("first_edit.ipynb")
    assert space["result"].proofs.ok and space["shown"][-1] is True
    assert space["result"].verdict.ship in space["shown"]


def test_audit():
    space = run("audit.ipynb")
    assert space["proofs"].ok and not space["forged"].ok and "model.safetensors" in space["forged"].fault
    assert space["evaluation"].to_dict()["tasks"]["probes"]


@pytest.mark.slow
def test_in_memory(capsys):
    runpy.run_path(str(EXAMPLES / "in_memory.py"))["main"](str(EXAMPLES.parent / "kbne_edit" / "demo"))
    reply = capsys.readouterr().out.splitlines()
    assert float(reply[1].rsplit(" ", 1)[1]) > 0.1 and float(reply[2].rsplit(" ", 1)[1]) == 0
