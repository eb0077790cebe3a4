"""Which mistakes would no test see? Mutations of the source, made by hand, and the tests that should fail for each.

`mutations.yaml` lists them: a file, its text, what takes the text's place, and a selection of tests. Each mutation is
made in a copy of the tree, and only its own tests are run there. It survives if they pass. Such a one has a `because`
in the list (an equal program, or why no test is worth it), or is a gap.

One process imports the large libraries once. Each mutation runs in a fork of it, within a limit of time, and a test
that hangs has seen the mutation. Before the first mutation its tests are run on the tree as it is: a selection that
fails there, or that selects no test, says nothing, and is an error. So is a text that does not stand in its file once.

    python benchmarks/mutants.py                      (all, about 10 minutes)
    python benchmarks/mutants.py --part 2/4 --json    (every fourth, from the second on)
    python benchmarks/mutants.py --only statistics    (those whose file or new text holds a word)
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

ROOT = Path(__file__).resolve().parent.parent
LIST = Path(__file__).with_name("mutations.yaml")
SECONDS = 90  # of one mutation's tests

State = Literal["killed", "survived", "stale", "selects nothing", "fails without it"]
_PASSED, _FAILED, _NOTHING = 0, 1, 5  # exit statuses of pytest


@dataclass(frozen=True)
class Mutation:
    """file: below kbne_edit. old: stands in it once. tests: arguments of pytest. because: why it may survive."""

    file: str
    old: str
    new: str
    tests: str
    because: str = ""

    @property
    def path(self) -> str:
        return f"kbne_edit/{self.file}"

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.path}: {old!r} -> {new!r} ({self.tests})"


@dataclass
class Runner:
    """Runs tests in forks, in a copy of the tree. plain: {tests: exit status without a mutation}."""

    tree: Path
    plain: dict[str, int] = field(default_factory=dict)

    def state(self, mutation: Mutation) -> State:
        source = self.tree / mutation.path
        text = source.read_text(encoding="utf-8") if source.is_file() else ""
        if text.count(mutation.old) != 1 or mutation.old == mutation.new:
            return "stale"
        if mutation.tests not in self.plain:
            self.plain[mutation.tests] = self._pytest(mutation.tests)
        if self.plain[mutation.tests] == _NOTHING:
            return "selects nothing"
        if self.plain[mutation.tests] != _PASSED:
            return "fails without it"
        source.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        try:
            return "survived" if self._pytest(mutation.tests) == _PASSED else "killed"
        finally:
            source.write_text(text, encoding="utf-8")

    def _pytest(self, tests: str) -> int:
        """The exit status of the tests in a child; `_FAILED` for one that takes too long."""
        sys.stdout.flush()
        sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.setsid()
            self._child(tests)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                code = os.waitstatus_to_exitcode(status)
                return code if code in (_PASSED, _NOTHING) else _FAILED
            time.sleep(0.02)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return _FAILED

    def _child(self, tests: str) -> None:
        """Never returns."""
        status = _FAILED
        try:
            os.chdir(self.tree)
            os.environ["PYTHONPATH"] = str(self.tree)
            sys.path[:] = [str(self.tree), str(self.tree / "tests"), *sys.path[1:]]
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            import pytest

            chosen = [f"tests/{word}" if word.endswith(".py") else word for word in shlex.split(tests)]
            status = int(pytest.main([*chosen, "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]))
        finally:
            os._exit(status)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the tree, its tracked files as they lie here."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    with tempfile.TemporaryDirectory(prefix="kbne-mutants-") as folder:
        tree = Path(folder) / "tree"
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, tree / name)
        if (ROOT.parent / "shared").is_dir():  # tests that need it are skipped without
            (Path(folder) / "shared").symlink_to(ROOT.parent / "shared")
        yield tree


def mutations() -> list[Mutation]:
    with open(LIST, encoding="utf-8") as file:
        return [Mutation(**entry) for entry in yaml.safe_load(file)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="1/1", help="K/N: every Nth mutation from the Kth on")
    parser.add_argument("--only", default="", help="those whose file, new text or tests hold this word")
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    chosen = [m for m in mutations() if arguments.only in f"{m.file} {m.new} {m.tests}"][part - 1 :: parts]
    sys.dont_write_bytecode = True  # two versions of a file within a second would share their byte code
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    import torch
    import transformers  # noqa: F401  imported here once, for all forks

    torch.set_num_threads(1)
    result: dict[State, list[Mutation]] = {}
    start = time.perf_counter()
    with copied() as tree:
        runner = Runner(tree)
        for mutation in chosen:
            state = runner.state(mutation)
            result.setdefault(state, []).append(mutation)
            seconds = time.perf_counter() - start
            print(f"{seconds:5.0f} s  {state:16} {mutation}", file=sys.stderr, flush=True)
    return report(result, len(chosen), arguments.as_json)


def report(found: dict[State, list[Mutation]], count: int, as_json: bool) -> int:
    """Print what was found. 1 if a mutation survives without a reason, or its entry says nothing."""
    survived = found.get("survived", [])
    gaps = [m for m in survived if not m.because]
    useless = {state: of for state, of in found.items() if state not in ("killed", "survived")}
    if as_json:
        record = {state: [str(m) for m in of] for state, of in found.items() if state != "killed"}
        print(json.dumps({"mutations": count, "killed": len(found.get("killed", [])), **record}))
    else:
        for mutation in survived:
            print(f"survived  {mutation}\n          {mutation.because or 'not explained'}")
        for state, of in useless.items():
            for mutation in of:
                print(f"{state}  {mutation}")
        print(f"{len(survived)} of {count} mutations survive, {len(gaps)} of them not explained")
    return int(bool(gaps or useless))


if __name__ == "__main__":
    sys.exit(main())
