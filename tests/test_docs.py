"""What the README and the pages say is so."""

import importlib.metadata
import json
import re
import runpy
import shlex
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest

import kbne_edit
from kbne_edit.commands import cli
from kbne_edit.families import FAMILIES as known_families
from tiny import FAMILIES, INFERRED, MIXTURES, WHOLE

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
MADE = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))
PAGES = [ROOT / "README.md", *sorted(path for path in DOCS.rglob("*.md") if path.name not in MADE["PAGES"])]
COMMANDS = sorted(
    {
        re.split(r"  #| \| ", line.split("kbne-edit ", 1)[1])[0].strip()
        for page in PAGES
        for _, block in re.findall(r"```(\w*)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        for line in block.splitlines()
        if re.match(r"(\$ |  |.*&& \.venv/bin/)?kbne-edit [a-z]", line)
    }
)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_is_understood(line):
    command, arguments = cli, shlex.split(line)
    context = click.Context(command)
    while isinstance(command, click.Group):
        command = command.get_command(context, arguments.pop(0))
        assert command is not None, line
    names = ["-h", "--help"]  # click keeps the first ones that it sees of a command
    try:
        command.make_context("kbne-edit", arguments, help_option_names=names)  # parses all; a wrong one raises
    except click.exceptions.Exit as done:  # an option that answers by itself
        assert done.exit_code == 0


def test_every_command_is_shown():
    assert {line.split()[0] for line in COMMANDS} == set(cli.list_commands(click.Context(cli)))


def test_every_architecture_is_named():
    page = (DOCS / "architectures.md").read_text(encoding="utf-8").split("## Refused")[0]
    tested = {name.split("-")[0] for name in [*FAMILIES, *MIXTURES, *WHOLE]}
    named = set(re.findall(r"`([a-z0-9_-]+)`", page))
    assert tested <= named and named - tested <= {*known_families, *INFERRED}


def test_the_readme_is_one_that_people_finish():
    assert len(README.encode()) <= 10_000 and len(README.splitlines()) <= 150


def test_an_installation_brings_one_module():
    try:
        installed = importlib.metadata.distribution("kbne-edit")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("not installed: the checkout itself is tested")
    top = {path.parts[0] for path in installed.files if path.parts[0] != ".."}
    assert top == {"kbne_edit", f"kbne_edit-{kbne_edit.__version__}.dist-info"}


@pytest.mark.parametrize("page", [str(path.relative_to(ROOT)) for path in PAGES])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\((.*?)\)", text) if not link.startswith("https://")]
    for link in links:
        file, _, heading = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.is_file(), link
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if heading else []
        assert not heading or heading in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}, link


def test_the_map_shows_what_bake_prints():
    """The drawing's marks, the words about it, and the printed output, against one another."""
    drawing = ElementTree.parse(DOCS / "map.svg").getroot()
    kinds = {"first": ("circle", "cy", 0), "second": ("rect", "y", 3.5)}  # squares are 7 units high
    rows = {
        kind: [float(m.get(y)) + half for m in drawing.iterfind(f".//{{*}}{tag}") if m.get("class") == kind]
        for kind, (tag, y, half) in kinds.items()
    }
    edited, layers = map(int, re.search(r"debiased: (\d+) neurons \(.*?\) in (\d+) layers", README).groups())
    shared = int(re.search(rf"FAIL +(\d+) of {edited} neurons are also selected", README)[1])
    assert (len(rows["first"]), len(rows["second"])) == (edited - shared, shared)
    assert len({*rows["first"], *rows["second"]}) == layers
    reply = re.search(r"!\[.*?(\d+) are edited, in layers (\d+) and (\d+) of (\d+); .* select (\d+) of them", README)
    result = json.loads((DOCS / "map.json").read_text())
    places = sorted({layer for layer, _, _ in result["edited"]})
    assert [int(n) for n in reply.groups()] == [edited, *places, result["layers"], shared]


@pytest.mark.slow
def test_the_map_is_that_of_the_demo():
    measure = runpy.run_path(str(ROOT / "scripts" / "make_docs.py"))["measure"]
    now, then = json.loads(measure()), json.loads((DOCS / "map.json").read_text())
    assert {**now, "others": 0} == {**then, "others": 0}
    apart = {tuple(m) for m in now["others"]} ^ {tuple(m) for m in then["others"]}
    assert len(apart) <= 2  # the last of the strongest may be another one on another machine


def test_each_row_of_the_comparison_has_its_evidence():
    page = (DOCS / "comparison.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \*\*(.*?)\*\* (\|.*)$", page, re.MULTILINE)
    assert [name for name, _ in rows] == re.findall(r"^## (.*)$", page, re.MULTILINE)
    assert all(len(cells.split("|")) == 8 and all(cell.strip() for cell in cells.split("|")[1:-1]) for _, cells in rows)
    short = re.findall(r"^\| \*\*(.*?)\*\* \|", README, re.MULTILINE)
    assert short and set(short) <= {name for name, _ in rows}
