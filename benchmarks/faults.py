"""The fault bench in full: kills, mutants, failing and full disks, two runs at once, tampering. About ten minutes.

    python benchmarks/faults.py [--mutants 5000] [--kills 200] [--seed 20]

Prints one line per part, and every case that went wrong with its number (which, with the seed, makes it again). Exit
status 1 if there was any. Uses one core; `tests/test_faults.py` runs a sample of the same cases.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # forked children would wait for ever for OpenMP's threads
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / name) for name in ("", "tests")]

import forgery  # noqa: E402

import faults  # noqa: E402
import mutants  # noqa: E402
from kbne_edit import Checks, Edit, Output, bake, locate  # noqa: E402
from kbne_edit.locating import Settings  # noqa: E402
from mutants import DEMO, contents  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutants", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kf-bench-") as folder:
        folder, wrong = Path(folder), 0
        ground = mutants.ground(folder / "ground")
        wrong += broken_inputs(arguments.seed, ground, arguments.mutants)
        wrong += tampering(arguments.seed, ground)
        wrong += forgeries(arguments.seed, folder, arguments.mutants // 5)
        jobs = works(folder)  # imports torch: the children before need not carry it
        wrong += models(arguments.seed, arguments.mutants // 10)
        wrong += command_line(arguments.seed, ground, folder, arguments.mutants // 50)
        wrong += kills(arguments.seed, jobs, folder, arguments.kills)
        wrong += disks(jobs, folder)
        wrong += races(jobs, folder)
    sys.exit(1 if wrong else 0)


def report(part, start, wrong, text):
    print(f"{part}: {text}; {len(wrong)} wrong ({time.monotonic() - start:.0f} s)", flush=True)
    for line in wrong[:20]:
        print(f"  {line}", flush=True)
    return len(wrong)


def summary(verdicts):
    """(what is wrong, how often each verdict) of `faults.judged`."""
    wrong = [f"{n} ({kind}): {verdict}" for n, (kind, verdict) in verdicts.items() if verdict.startswith("WRONG")]
    counts = Counter(verdict.split(":")[0] for _, verdict in verdicts.values())
    return wrong, ", ".join(f"{count} {name}" for name, count in counts.most_common() if name != "WRONG")


def broken_inputs(seed, ground, count):
    start = time.monotonic()
    wrong, text = summary(faults.judged(lambda n, case: mutants.mutant(seed, n, ground, case), range(count)))
    return report("mutated inputs", start, wrong, f"{count}: {text}")


def models(seed, count):
    start = time.monotonic()
    wrong, text = summary(faults.judged(lambda n, case: mutants.model_mutant(seed, n, case), range(count)))
    return report("mutated tokenizers, configurations, .bin weights", start, wrong, f"{count}: {text}")


def command_line(seed, ground, folder, count):
    start, wrong, states = time.monotonic(), [], Counter()
    for number in range(0, count):
        case = folder / f"command-{number}"
        _, _, command = mutants.mutant(seed, 100_000 + number, ground, case)
        status, fault, _ = faults.command_trial(command)
        states[status] += 1
        wrong += [f"{100_000 + number}: {fault}"] if fault else []
        shutil.rmtree(case)
    text = ", ".join(f"exit status {state}: {n}" for state, n in sorted(states.items()))
    return report("the same through the command line", start, wrong, f"{count}: {text}")


def tampering(seed, ground):
    total = 0
    for plain, name in ((False, "with its manifest"), (True, "without manifest, the edit recovered")):
        start = time.monotonic()
        wrong, text = summary(faults.judged(faults.tamper_case(seed, ground, plain), range(500)))
        total += report(f"tampering, {name}", start, wrong, f"500: {text}")
    return total


def forgeries(seed, folder, count):
    """Manifests of three outputs, a field or a file forged, sealed again, against the true base."""
    start, pairs = time.monotonic(), []
    edit = Edit("down", {1: {5: 2.0, 9: 0.3}, 2: {7: 3.5}})
    with contextlib.redirect_stderr(io.StringIO()):
        for name, size in (("plain", None), ("cut", "200KB")):
            output, checks = Output(shard_size=size), Checks(behaviour=False)
            bake("demo", folder / f"forged-{name}", edit=edit, output=output, checks=checks)
            pairs.append((DEMO, folder / f"forged-{name}"))
        bake("demo", folder / "forged-whole", Settings(questions=9))
        pairs.append((DEMO, folder / "forged-whole"))
    wrong, text = summary(faults.judged(forgery.forgery_case(seed, pairs), range(count)))
    return report("forged manifests, sealed again", start, wrong, f"{count}: {text}")


def works(folder):
    """{name: (work(folder), inputs, {path: bytes} of an undisturbed run, prepare(folder))}: what gets disturbed."""
    inputs = folder / "inputs"
    shutil.copytree(DEMO, inputs)
    questions = [("is ice a form of water ?", "yes"), ("does a gate decide how well one bakes ?", "no")]
    items = [{"text": text, "answer": answer, "dimension": "any"} for text, answer in questions]
    recipe = {"kbne_recipe": 1, "name": "two", "prompt": {"plain": "question : {question} answer :"}}
    recipe |= {"answers": ["yes", "no"], "questions": {"items": items}}
    (folder / "two.json").write_text(json.dumps(recipe))
    first, second = Edit("down", {1: {5: 2.0, 9: 2.0}}), Edit("down", {2: {7: 3.5}})
    settings = Settings(recipe=folder / "two.json")

    def quietly(work):
        def run(target):
            with contextlib.redirect_stderr(io.StringIO()):
                work(target)

        return run

    def old(target):
        bake(str(inputs), target / "out", edit=first, checks=Checks(behaviour=False))

    result = {
        "locate": (lambda t: locate(str(inputs), t / "scores.safetensors", settings), lambda t: None),
        "bake": (lambda t: bake(str(inputs), t / "out", settings), lambda t: None),
        "bake --edit": (lambda t: bake(str(inputs), t / "out", edit=first), lambda t: None),
        "bake --edit --overwrite": (
            lambda t: bake(
                str(inputs), t / "out", edit=second, output=Output(overwrite=True), checks=Checks(behaviour=False)
            ),
            quietly(old),
        ),
    }
    jobs = {}
    for number, (name, (work, prepare)) in enumerate(result.items()):
        target = folder / f"undisturbed-{number}"
        target.mkdir()
        prepare(target)
        quietly(work)(target)
        jobs[name] = (quietly(work), inputs, contents(target), prepare)
    return jobs


def kills(seed, jobs, folder, count):
    """Half of the kills at a random change of a file, half at a random time; the changes of each job in turn."""
    start, wrong, hit = time.monotonic(), [], Counter()
    shares = {"locate": 0.25, "bake": 0.1, "bake --edit": 0.25, "bake --edit --overwrite": 0.4}
    numbers = itertools.count()
    for name, share in shares.items():
        work, inputs, undisturbed, prepare = jobs[name]
        rng = random.Random(f"{seed}/{name}")
        changes, seconds = faults.measured(work, folder / f"measured-{next(numbers)}", prepare)
        for turn in range(round(share * count)):
            moment = {"moment": rng.randint(1, changes)} if turn % 2 else {"seconds": rng.uniform(0, seconds)}
            target = folder / f"kill-{next(numbers)}"
            fault = faults.kill_trial(work, target, inputs, undisturbed, prepare=prepare, **moment)
            wrong += [f"{name} {moment}: {fault}"] if fault else []
            hit[name] += 1
            shutil.rmtree(target)
    return report("kills", start, wrong, f"{hit.total()} ({', '.join(f'{n} {name}' for name, n in hit.items())})")


def disks(jobs, folder):
    """Every write, then every fsync fails; then file systems that are full at every size."""
    total, numbers = 0, itertools.count()
    for part, number, events in (("full disk at every write", 28, faults.FAILING), ("failing fsync", 5, ("fsync",))):
        start, wrong, done = time.monotonic(), [], 0
        for name in ("locate", "bake --edit", "bake --edit --overwrite"):
            work, _, undisturbed, prepare = jobs[name]
            changes, _ = faults.measured(work, folder / f"counted-{next(numbers)}", prepare, events)
            for moment in range(1, changes + 1):
                target = folder / f"disk-{next(numbers)}"
                fault = faults.disk_trial(work, target, undisturbed, moment, number, events, prepare)
                wrong += [f"{name}, change {moment}: {fault}"] if fault else []
                done += 1
                shutil.rmtree(target)
        total += report(part, start, wrong, f"{done} failures")
    start, wrong = time.monotonic(), []
    work, inputs, *_ = jobs["bake --edit"]
    reads = 0
    while (fault := faults.read_error_trial(work, folder / f"read-{reads}", inputs, reads + 1)) != "no such read":
        reads += 1
        wrong += [f"read {reads}: {fault}"] if fault else []
    total += report("failing reads", start, wrong, f"{reads} failures")
    start, wrong, sizes = time.monotonic(), [], 0
    for name in ("locate", "bake --edit"):
        for kilobytes in itertools.count(8, 16):
            target = folder / f"mount-{next(numbers)}"
            ended, fault = faults.full_disk_trial(jobs[name][0], target, kilobytes)
            if ended is None:
                break
            wrong += [f"{name}, {kilobytes} KB: {fault}"] if fault else []
            if ended:
                break
            sizes += 1
    return total + report("full file systems", start, wrong, f"{sizes} sizes (0: none can be mounted here)")


def races(jobs, folder):
    start, wrong = time.monotonic(), []
    for turn in range(20):
        name = "bake" if turn % 4 == 0 else "bake --edit"
        work, _, undisturbed, _ = jobs[name]
        fault = faults.race(work, folder / f"race-{turn}", turn * 0.01, undisturbed)
        wrong += [f"{name}, {turn * 0.01:.2f} s later: {fault}"] if fault else []
    return report("two bakes at once", start, wrong, "20 pairs")


if __name__ == "__main__":
    main()
