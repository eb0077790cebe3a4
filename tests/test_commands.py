"""The commands' page is their help, and the shell completes them."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from kbne_edit.commands import COMMANDS, cli

ROOT = Path(__file__).resolve().parent.parent
# As the installed script starts it: click reads the name of the variable off the program's.
PROGRAM = "import sys; sys.argv[0] = 'kbne-edit'; from kbne_edit.commands import main; main()"
MADE = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))


@pytest.mark.parametrize("name", MADE["PAGES"])
def test_a_page_that_is_made_is_up_to_date(name):
    text = MADE["PAGES"][name]()
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == text, "run scripts/make_docs.py"
    if name == "commands.md":
        assert all(f"\n## kbne-edit {command}\n" in text for command in [*COMMANDS, "recipes new"])


def test_an_option_means_one_thing():
    table = runpy.run_path(str(ROOT / "scripts" / "option_table.py"))
    every = list(table["uses"](cli))
    assert len(every) > 200 and table["doubles"](every) == []
    wrong = [*every, every[0]._replace(command="x", option="--tau", text="A temperature.")]
    wrong += [use._replace(command="y", value="list") for use in every if use.option == "--margin"][:1]
    assert [fault.partition(" (")[0] for fault in table["doubles"](wrong)] == [
        "--margin takes list and number",
        "--tau takes number and text" if every[0].value == "text" else "--tau takes flag and number",
        "--tau means 2 things",
    ]


def _completed(words, program=PROGRAM):
    variables = {
        "_KBNE_EDIT_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [line.partition(",")[2] for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    "words, found",
    [
        ("kbne-edit ", [*COMMANDS]),
        ("kbne-edit re", ["report", "revert", "recipes"]),
        ("kbne-edit recipes ", ["list", "show", "check", "new"]),
        ("kbne-edit bake --as ", ["checkpoint", "peft", "delta"]),
        ("kbne-edit select --dr", ["--drop-wrong"]),
        ("kbne-edit bake --in de", ["demo", "de"]),  # and folders, which the shell lists itself
        ("kbne-edit bake --recipe social-bias-t", ["social-bias-true-false", "social-bias-t"]),
        ("kbne-edit recipes show hi", ["hiring", "hi"]),
        ("kbne-edit evaluate --tasks copa,arc", ["copa,arc_easy", "copa,arc_challenge"]),
        ("kbne-edit bake --require effect,co", ["effect,cost"]),
    ],
)
def test_completion(words, found):
    assert sorted(_completed(words)) == sorted(found)


def test_completion_imports_nothing_large():
    seen = "import atexit, sys; atexit.register(lambda: sys.stderr.write(str(sorted(sys.modules))));" + PROGRAM
    variables = {"_KBNE_EDIT_COMPLETE": "bash_complete", "COMP_WORDS": "kbne-edit ", "COMP_CWORD": "1"}
    result = subprocess.run(
        [sys.executable, "-c", seen], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    assert "'click'" in result.stderr and "'torch'" not in result.stderr and "'numpy'" not in result.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_gets_a_script(shell):
    variables = {"_KBNE_EDIT_COMPLETE": f"{shell}_source"}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True
    )
    assert f"_KBNE_EDIT_COMPLETE={shell}_complete" in result.stdout, result.stderr
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=result.stdout, text=True).returncode == 0
