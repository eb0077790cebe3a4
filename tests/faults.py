"""The fault bench: forked children that are watched, killed at a chosen moment, or given a failing disk; tampering.

tests/test_faults.py takes a sample of it, benchmarks/faults.py runs it in full. Everything is seeded. The children are
forked from a process that has imported what they need, since importing torch takes longer than most cases.
"""

import builtins
import ctypes
import errno
import io
import itertools
import json
import os
import random
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from command import run_command

from kbne_edit import files, load_scores
from kbne_edit.errors import KbneError, ScoresError, one_line
from mutants import contents, hostile, reseal

SECONDS, MEMORY_MB = 10, 1024
FAILING = ("open", "write", "fsync", "mkdir", "rename", "pwrite", "truncate")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# ------------------------------------------------------------------------------------------------- watched children


def forked(work):
    """Run work() in a forked child. Returns (pid, read end of a pipe that carries the repr of its result)."""
    read, write = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    status = 1
    try:
        os.close(read)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        work(lambda line: os.write(write, line.encode("utf-8", "backslashreplace") + b"\n"))
        status = 0
    finally:
        os._exit(status)


def attempt(operation):
    """ "right", "found", "refused: …", or "WRONG: …" with where it broke."""
    try:
        result = operation()
    except KbneError as error:
        line = one_line(str(error))
        return f"refused: {line}" if line and len(line) < 4000 else "WRONG: no clear line"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return one_line(f"WRONG: {type(error).__name__} {str(error)[:80]} at {Path(last.filename).name}:{last.lineno}")
    return {None: "right", "found": "found"}.get(result, f"WRONG: {result}")


def judged(case_of, numbers):
    """{number: verdict}: every case in a child of its own kind, which is watched for time, memory and stray writes.

    case_of(number, folder) lays a case out and returns (description, operation); see `mutants.mutant`.
    """
    verdicts, left = {}, list(numbers)
    while left:
        pid, pipe = forked(lambda tell, left=tuple(left): _cases(case_of, left, tell))
        fate = _collect(pipe, left, verdicts, pid)
        os.close(pipe)
        if left and fate:
            verdicts[left.pop(0)] = ("?", f"WRONG: {fate}")
    return verdicts


def _collect(pipe, left, verdicts, pid):
    """Take verdicts off the pipe until it ends. Returns how the child died, or None."""
    buffer, fate, since, used = b"", None, time.monotonic(), _cpu_seconds(pid)
    while True:
        ready, _, _ = select.select([pipe], [], [], 1)
        if not ready:
            computed, waited = _cpu_seconds(pid) - used, time.monotonic() - since
            if computed < SECONDS and waited < 12 * SECONDS:  # a busy machine is slow, and no fault
                continue
            fate = f"no end after {computed:.0f} s of computing, {waited:.0f} s in all"
            os.kill(pid, signal.SIGKILL)
        data = os.read(pipe, 1 << 16) if ready else b""
        since, used = time.monotonic(), _cpu_seconds(pid)
        if not data:
            break
        buffer += data
        *lines, buffer = buffer.split(b"\n")
        for line in lines:
            number, kind, verdict = line.decode().split("\t", 2)
            verdicts[int(number)] = (kind, verdict)
            left.remove(int(number))
    status = os.waitpid(pid, 0)[1]
    return fate or (f"the process ended with {status}" if status and left else None)


def _cpu_seconds(pid):
    """What the process and the children that it waited for have computed."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _cases(case_of, numbers, tell):
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + (3 << 30),) * 2)
    inherited = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10  # by the fork
    allowed, stray = [], []
    sys.addaudithook(lambda event, args: _stray(event, args, allowed, stray))
    for number in numbers:
        with tempfile.TemporaryDirectory(prefix="kf-") as folder:
            kind, operation, *_ = case_of(number, Path(folder))
            allowed[:], stray[:] = [os.path.join(folder, "area")], []
            verdict = attempt(operation)
            allowed.clear()
        if stray:
            verdict = f"WRONG: wrote outside --out: {one_line(stray[0])}"
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10) - inherited
        if peak > MEMORY_MB:
            verdict = f"WRONG: {peak} MB of memory"
        tell(f"{number}\t{kind}\t{verdict}")
        if peak > MEMORY_MB:
            os._exit(0)  # the peak does not fall: the next case takes a fresh child


def _address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _stray(event, args, allowed, stray):
    """An audit hook: notes every change of a file that is not below `allowed` (empty: notes nothing)."""
    if not allowed:
        return
    if event == "open":
        changes = [args[0]] if isinstance(args[2], int) and args[2] & _WRITING else []
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.chmod"):
        changes = [args[0]]
    elif event in ("os.rename", "os.link", "os.symlink"):
        changes = [args[0], args[1]]
    else:
        return
    directory = next((a for a in args[1:] if isinstance(a, int) and a > 2), None) if event != "open" else None
    for path in changes:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if directory is not None and not os.path.isabs(path):
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
        parent, name = os.path.split(os.path.abspath(path))
        real = os.path.join(os.path.realpath(parent), name)
        inside = os.path.realpath(allowed[0])
        if "torchinductor_" in real:  # torch makes its cache folder when it is first used
            continue
        if real != os.devnull and os.path.commonpath([inside, real]) != inside:
            stray.append(f"{event} {path}")


# ---------------------------------------------------------------------------------------------- kills, failing disks


def strike(moment, action, events=(*FAILING, "unlink", "rmdir")):
    """From now on, in this process: count what changes files, and call action() before the change number `moment`.

    Returns the counter's reader. To be called in a forked child: nothing is undone.
    """
    counter, count = itertools.count(1), [0]

    def event(name):
        if name in events:
            count[0] = next(counter)
            if count[0] == moment:
                action()

    real = io.open

    def opened(file, mode="r", *args, **kwargs):
        if not set("wax+") & set(mode):
            return real(file, mode, *args, **kwargs)
        event("open")
        return _Watched(real(file, mode, *args, **kwargs), event)

    def watched(name, function):
        def call(*args, **kwargs):
            event(name)
            return function(*args, **kwargs)

        return call

    builtins.open = io.open = opened
    for name in set(events) - {"open", "write"}:
        setattr(os, name, watched(name, getattr(os, name)))
    return lambda: count[0]


class _Watched:
    """A file open for writing; each write is an event."""

    def __init__(self, file, event):
        self._file, self._event = file, event

    def write(self, data):
        self._event("write")
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def measured(work, folder, prepare=lambda folder: None, events=None):
    """(how many changes of files, how many seconds) an undisturbed work(folder) takes."""
    folder.mkdir()
    prepare(folder)

    def counted(tell):
        read, start = strike(0, lambda: None, *([events] if events else [])), time.monotonic()
        work(folder)
        tell(f"{read()} {time.monotonic() - start}")

    pid, pipe = forked(counted)
    with os.fdopen(pipe) as file:
        changes, seconds = file.read().split()
    os.waitpid(pid, 0)
    shutil.rmtree(folder)
    return int(changes), float(seconds)


def killed(work, moment=None, seconds=None):
    """Run work() in a child that is killed before change number `moment`, or after `seconds`. True if it was hit."""

    def doomed(tell):
        if moment is not None:
            strike(moment, lambda: os.kill(os.getpid(), signal.SIGKILL))
        work()

    pid, pipe = forked(doomed)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(pipe)
    return os.WIFSIGNALED(status)


def verdict_of(work):
    """The verdict (see `attempt`) of work() in a forked child, "" if the child died."""
    pid, pipe = forked(lambda tell: tell(attempt(lambda: (work(), None)[1])))
    with os.fdopen(pipe) as file:
        verdict = file.read().strip()
    os.waitpid(pid, 0)
    return verdict


def failing(work, moment, number=errno.ENOSPC, events=FAILING):
    """The verdict of work() where change number `moment` fails with an error of the operating system."""

    def fail():
        raise OSError(number, os.strerror(number))

    def doomed():
        strike(moment, fail, events)
        return work()

    return verdict_of(doomed)


def command_trial(command):
    """(exit status, None or what is wrong, stderr) of a command line: one clear line, and no traceback."""
    try:
        result = run_command(*command, cwd=os.getcwd(), timeout=60, before=_without_override)
    except subprocess.TimeoutExpired:
        return None, "hangs", ""
    error = result.stderr
    lines = [line for line in error.splitlines() if line.startswith(("error:", "Error:"))]
    fine = result.returncode in (0, 1) and not lines or result.returncode in (2, 3) and len(lines) == 1
    return result.returncode, None if fine and "Traceback" not in error else f"not one line: {error[-300:]}", error


def _without_override():
    """For root, too, permissions are to hold: drop CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.geteuid() == 0:
        for capability in (1, 2):
            ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


# ------------------------------------------------------------------------------------------------------- kill trials


def kill_trial(work, folder, inputs, undisturbed, moment=None, seconds=None, prepare=lambda folder: None):
    """None, or what is wrong after work(folder) was killed and then run again.

    inputs: a folder that must stay as it is. undisturbed: {path: bytes} of the folder after a run without a kill.
    prepare(folder): what is there already.
    """
    before = contents(inputs)
    folder.mkdir()
    prepare(folder)
    old = _below(contents(folder), "out/")
    killed(lambda: work(folder), moment, seconds)
    if wrong := _unfinished(folder, undisturbed, old):
        return wrong
    verdict = verdict_of(lambda: work(folder))
    published = verdict.startswith("refused") and " exists" in verdict and (folder / "out").is_dir()
    if verdict != "right" and not published:
        return f"the second run says {verdict}"
    if left := [p.name for p in folder.rglob("*") if "kbne-" in p.name or p.name.endswith(".new")]:
        return f"left behind: {left}"
    if contents(folder) != undisturbed:
        return "the resumed result differs"
    return "an input changed" if contents(inputs) != before else None


def _below(files, prefix):
    return {name: data for name, data in files.items() if name.startswith(prefix)}


def _unfinished(folder, undisturbed, old):
    """What stands under a result's name without being the result."""
    result = {k: v for k, v in contents(folder).items() if not k.startswith(".") and "/." not in k}
    if _below(result, "out/") not in ({}, old, _below(undisturbed, "out/")):
        return "out looks finished and is not"
    for name, data in result.items():
        if name.endswith("scores.safetensors") and data != undisturbed[name]:
            try:
                load_scores(folder / name)
                return f"{name} looks finished and is not"
            except ScoresError:
                pass
        elif name.endswith("edit.json") and not name.startswith("out/") and data != undisturbed[name]:
            return f"{name} looks finished and is not"
    return None


def disk_trial(work, folder, undisturbed, moment, number=errno.ENOSPC, events=FAILING, prepare=lambda folder: None):
    """None, or what is wrong after change number `moment` of work(folder) failed, and after the next run.

    What `locate` had found is kept, but must not look finished.
    """
    folder.mkdir()
    prepare(folder)
    before = contents(folder)
    verdict = failing(lambda: work(folder), moment, number, events)
    after = contents(folder)
    if verdict == "right":  # making a folder that is there may fail; what was replaced the next run removes
        return None if _below(after, "out") == _below(undisturbed, "out") else "the result is not right"
    if not verdict.startswith("refused: cannot write") or os.strerror(number) not in verdict:
        return f"says {verdict}"
    left = {name: data for name, data in after.items() if not name.startswith(("out.work/", "scores"))}
    if left != before:
        return f"left behind: {sorted(set(left) ^ set(before))}"
    if wrong := _unfinished(folder, undisturbed, _below(before, "out/")):
        return wrong
    again = verdict_of(lambda: work(folder))
    return None if again == "right" and contents(folder) == undisturbed else f"the next run says {again}"


def read_error_trial(work, folder, inputs, moment):
    """None, or what is wrong after read number `moment` of the inputs' bytes failed."""
    folder.mkdir()

    class Failing(io.FileIO):
        reads = itertools.count(1)

        def readinto(self, buffer):
            if next(self.reads) == moment:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().readinto(buffer)

    def doomed():
        files.InputFile.__bases__ = (Failing,)
        return work(folder)

    verdict = verdict_of(doomed)
    if verdict == "right":
        return "no such read"
    named = f"{inputs}/" in verdict or ".kbne-partial/" in verdict  # the proof reads what was written, too
    fine = verdict.startswith("refused: cannot read") and named and os.strerror(errno.EIO) in verdict
    return None if fine and not any(folder.iterdir()) else f"says {verdict}, leaves {list(folder.iterdir())}"


def full_disk_trial(work, folder, kilobytes):
    """(ended well, what is wrong or None) on a file system of that size; (None, None) where none can be mounted."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        return None, None
    try:
        verdict = verdict_of(lambda: work(folder))
        left = [name for name in contents(folder) if not name.startswith(("out.work/", "scores"))]
    finally:
        subprocess.run(["umount", folder], check=True)
    if verdict == "right":
        return True, None
    if not verdict.startswith("refused: cannot write") or "No space left" not in verdict:
        return False, f"says {verdict}"
    return False, f"left behind: {left}" if left else None


def race(work, folder, delay, undisturbed):
    """None, or what is wrong after work(folder) ran twice at once, the second `delay` seconds later."""
    folder.mkdir()
    children = []
    for pause in (0, delay):
        time.sleep(pause)
        children.append(forked(lambda tell: tell(attempt(lambda: (work(folder), None)[1]))))
    verdicts = []
    for pid, pipe in children:
        with os.fdopen(pipe) as file:
            verdicts.append(file.read().strip())
        os.waitpid(pid, 0)
    right, other = sorted(verdicts, key=lambda v: v != "right")
    if right != "right" or not other.startswith("refused") or not ("another run" in other or " exists" in other):
        return f"they say {verdicts}"
    return None if contents(folder) == undisturbed else "the winner's output is not right"


# --------------------------------------------------------------------------------------------------------- tampering


def flip(rng, path):
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def tamper(rng, baked, weights_only=False):
    """Change one thing in a baked directory. Returns what. weights_only: it has no manifest."""
    files = sorted(p for p in baked.rglob("*") if p.is_file())
    shards = [p for p in files if p.suffix == ".safetensors" and "undo" not in p.name]
    ways = ["flip a weight", "flip anywhere", "remove", "add", "append", "nan", "zero"]
    if not weights_only:
        ways += [
            "swap",  # without a manifest it is the same model: every tensor is there, in another file
            "flip manifest",
            "manifest value",
            "manifest key",
            "resealed hash",
            "resealed files",
            "resealed factor",
        ]
    way = rng.choice(ways)
    victim = rng.choice(shards)
    start = 8 + int.from_bytes(victim.read_bytes()[:8], "little")
    if way == "flip a weight":
        data = bytearray(victim.read_bytes())
        data[rng.randrange(start, len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(bytes(data))
    elif way == "flip anywhere":
        flip(rng, rng.choice([f for f in files if not weights_only or f not in shards]))
    elif way == "swap" and len(shards) > 1:
        a, b = shards[0].read_bytes(), shards[1].read_bytes()
        shards[0].write_bytes(b)
        shards[1].write_bytes(a)
    elif way in ("nan", "zero"):
        data = bytearray(victim.read_bytes())
        position = start + 4 * rng.randrange((len(data) - start) // 4)
        data[position : position + 4] = b"\0\0\xc0\x7f" if way == "nan" else b"\0\0\0\x80"
        victim.write_bytes(bytes(data))
    elif way == "remove":
        rng.choice(files).unlink()
    elif way == "add":
        (
            baked
            / rng.choice(("extra.txt", "chat_template.jinja", "pytorch_model.bin", "generation_config.json", "x.py"))
        ).write_bytes(b"new")
    elif way == "append" or way == "swap":
        with open(rng.choice(files), "ab") as file:
            file.write(b"\n" if rng.random() < 0.5 else b"\0")
    elif way == "flip manifest":
        flip(rng, baked / "kbne_edit.json")
    else:
        way += f": {_tamper_manifest(rng, baked, way)}"
    return way


def _tamper_manifest(rng, baked, way):
    path = baked / "kbne_edit.json"
    manifest = json.loads(path.read_text())
    key = rng.choice(sorted(manifest))
    name = rng.choice(sorted(manifest["files"]))
    if way == "manifest value":
        manifest[key] = hostile(rng)
    elif way == "manifest key":
        if rng.random() < 0.5:
            manifest[rng.choice(("note", "proofs", "license", "x"))] = "added"
        else:
            manifest.pop(key)
    elif way == "resealed hash":
        manifest["files"][name][rng.choice(("in", "out"))] = "0" * 64
    elif way == "resealed files":
        manifest["files"][name + ".more"] = manifest["files"].pop(name)
    else:
        layer = rng.choice(sorted(manifest["edit"]["factors"]))
        manifest["edit"]["factors"][layer]["5"] = 2.0
    path.write_text(json.dumps(manifest, indent=1) + "\n")
    if way.startswith("resealed"):
        reseal(baked)
    return key if way in ("manifest value", "manifest key") else name


def tamper_case(seed, folder, plain):
    """case_of for `judged`: a tampered copy that verify must not accept. plain: no manifest, the edit is recovered."""
    from kbne_edit import verify

    def case_of(number, case):
        rng = random.Random(f"{seed}/tamper/{number}/{plain}")
        (case / "area").mkdir()
        baked = case / "baked"
        shutil.copytree(folder / "baked", baked)
        if plain:
            for name in ("kbne_edit.json", "kbne_undo.kbne"):
                (baked / name).unlink()
        undisturbed = contents(baked)
        way = tamper(rng, baked, plain)
        while contents(baked) == undisturbed:
            way = tamper(rng, baked, plain)

        def judge():
            proofs = verify(folder / "base", baked, behaviour=False)  # a configuration in other words is a note
            return "found" if not proofs.ok or proofs.files.notes else f"not found: {way}"

        return way, judge

    return case_of
