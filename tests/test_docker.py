"""The Dockerfiles copy what the package is built from, and the ignore file lets through nothing else."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_what_is_copied_exists_and_is_let_through(kind):
    text = (ROOT / "docker" / f"{kind}.Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.M) for name in line.split()[:-1]]
    lines = (ROOT / ".dockerignore").read_text().split()
    assert lines[0] == "*" and sorted(f"!{name}" for name in copied) == sorted(x for x in lines if x.startswith("!"))
    assert all((ROOT / name).exists() for name in copied)
    project = (ROOT / "pyproject.toml").read_text()
    for needed in ("recipes", "kbne_edit", "README.md", "LICENSE"):  # what the build of the wheel reads
        assert needed in project and needed in copied
    for extra in re.search(r"'\.\[(.+)\]'", text)[1].split(","):
        assert f"\n{extra} = [" in project


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_it_runs_as_nobody_special_and_starts_the_command(kind):
    lines = (ROOT / "docker" / f"{kind}.Dockerfile").read_text().splitlines()
    assert lines.index("USER kbne") < lines.index('ENTRYPOINT ["kbne-edit"]')
