"""Broken inputs: seeded mutations of every kind of file that kbne-edit reads, and what must hold for each.

A mutant is refused with a KbneError, or the result is right by an oracle that shares no code with the package
(safetensors' own reader, plain NumPy, the bytes of the undisturbed files).
"""

import functools
import json
import os
import random
import re
import shutil
import socket
import struct
import tempfile
from pathlib import Path

import numpy as np
import yaml
from manifests import read_manifest, sha256, write_manifest
from safetensors.numpy import load_file, save_file

from kbne_edit import Edit, fold, load_recipe, load_scores, locate, revert, select, verify
from kbne_edit.attribution.scores import Row, ScoresWriter
from kbne_edit.hub.source import resolved
from kbne_edit.locating import Settings
from kbne_edit.recipe import Question

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "kbne_edit" / "demo"
FACTORS = {0: {3: 2.0, 11: 3.5}, 1: {0: 0.3}}
KINDS = (
    "header",
    "header",
    "data",
    "index",
    "config",
    "baked header",
    "manifest",
    "manifest",
    "undo",
    "edit",
    "edit",
    "recipe",
    "recipe",
    "scores",
    "special",
    "names",
)
_DOWN = re.compile(r"model\.layers\.(\d+)\.mlp\.down_proj\.weight")


def ground(folder):
    """What the mutants are made from: a base in two shards, its baked directory, an edit, a recipe, scores."""
    base, rng = folder / "base", np.random.default_rng(0)
    (base / "extra").mkdir(parents=True)
    (base / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "num_hidden_layers": 2,
                "hidden_size": 8,
                "intermediate_size": 12,
                "vocab_size": 20,
                "rope_scaling": None,
                "torch_dtype": "float32",
            }
        )
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, base / name)
    (base / "extra" / "notes.txt").write_text("carried over\n")
    weight_map = {}
    for layer in range(2):
        name = f"model-{layer + 1:05}-of-00002.safetensors"
        shapes = {"down_proj": (8, 12), "gate_proj": (12, 8), "up_proj": (12, 8)}
        tensors = {
            f"model.layers.{layer}.mlp.{part}.weight": rng.standard_normal(shape, np.float32)
            for part, shape in shapes.items()
        }
        save_file(tensors, base / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    (base / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 2304}, "weight_map": weight_map})
    )
    edit = Edit("down", FACTORS, found={"by": "hand", "list": [1, "two", None]})
    edit.save(folder / "edit.json")
    fold(base, edit, folder / "baked")
    shutil.copyfile(ROOT / "recipes" / "demo.yaml", folder / "recipe.yaml")
    questions = tuple(Question(f"q {i}?", "yes", "ab"[i % 2], "f", i > 3) for i in range(6))
    about = {"model": "demo", "commit": None, "base": "0" * 64, "recipe": "demo", "site": "down"}
    writer = ScoresWriter(folder / "scores.safetensors", questions, 2, 12, about)
    for q in range(6):
        scores = rng.standard_normal((2, 12), np.float32)
        writer.write(q, Row(scores, p=0.5, p_best_wrong=0.4, p_answers=0.9, p_zero=0, residual=0, nodes=1))
    writer.close()
    return folder


# ------------------------------------------------------------------------------------------------------------ mutations


def _deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


def hostile(rng):
    """A value that no key expects."""
    numbers = [-1, 0, 1, 7, 2.0, 0.5, -0.0, 1e308, float("nan"), float("inf"), 10**12, 10**30, 10**400, 2**63, -(2**63)]
    texts = ["", "1", "..", "../../outside", "/etc/passwd", "a\nb", "\x1b[2J", "\ud800", "\0", "x" * 10_000, "yes"]
    texts += ["0" * 64, "F32", "F64", "BF16", "I4", "meta"]
    lists = [[], [[]], [None], [0, 10**12], [10**12, 10**12], [[0, 4], [2, 8]], _deep(30), _deep(300), [1] * 999]
    objects = [{}, {"a": {}}, {"": ""}, {"0": {"0": 2}}, {"in": 1, "out": 2}]
    return rng.choice([None, True, False, *numbers, *texts, *lists, *objects])


def _paths(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _paths(inner, (*path, key))


def spoil_value(rng, data):
    """JSON data with one to three values replaced, removed, doubled or renamed."""
    data = json.loads(json.dumps(data))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(_paths(data)))
        if not path:
            if rng.random() < 0.2:
                return hostile(rng)
            continue
        holder = data
        for key in path[:-1]:
            holder = holder[key]
        action = rng.randrange(6)
        if action == 0:
            del holder[path[-1]]
        elif action == 1 and isinstance(holder, dict):
            other = rng.choice(["", "..", "a\nb", "unknown", "\ud800", "1", "-1", "99999999999", "07"])
            holder[other] = holder.pop(path[-1])
        elif action == 2 and isinstance(holder[path[-1]], (int, float)):
            holder[path[-1]] = holder[path[-1]] * rng.choice((-1, 0, 2, 10**9, 1.5)) + rng.choice((0, 1, -1))
        elif action == 3 and isinstance(holder, dict):
            holder[rng.choice(["unknown", "base", "files", "0", "5", "__metadata__", "aliases"])] = hostile(rng)
        else:
            holder[path[-1]] = hostile(rng)
    return data


def spoil_bytes(rng, data):
    """Bytes truncated, flipped, doubled, or replaced by what a JSON reader chokes on."""
    position = rng.randrange(max(len(data), 1))
    action = rng.randrange(12)
    if action < 3:
        return data[:position]
    if action < 7:
        spoilt = bytearray(data or b"\0")
        for _ in range(rng.choice((1, 1, 1, 8))):
            spoilt[rng.randrange(len(spoilt))] ^= 1 << rng.randrange(8)
        return bytes(spoilt)
    if action == 7:
        return data[:position] + rng.randbytes(rng.randrange(1, 40)) + data[position:]
    if action == 8:
        return data[position:] + data
    if action == 9:
        return data[:position] + rng.choice((b"9" * 5000, b"NaN", b"Infinity", b"-", b"\xff\xfe", b"\0", b"1e999"))
    short = [b"", b"{}", b"null", b"[]", b"NaN", b"\xef\xbb\xbf{}", b'"\\ud800"', b'{"a": 1, "a": 1}', b"\xff" * 50]
    long = [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b"0x" + b"f" * 20_000, b"1:" * 5000 + b"1"]
    yaml_only = [b"&a [*a, *a]", b"a: &b [1]\nc: *b\n", b"!!timestamp x", b"!!int ''", b"? [1]\n: 2\n", b"- " * 5000]
    return rng.choice([*short, *long, *yaml_only, b"!!python/name:os.system ''"])


def spoil_text(rng, data):
    """A JSON document with a spoilt value, or spoilt bytes."""
    if rng.random() < 0.3:
        return spoil_bytes(rng, data)
    return json.dumps(spoil_value(rng, json.loads(data))).encode()


def spoil_header(rng, data):
    """A safetensors file whose header lies."""
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    entry = header[name]
    action = rng.randrange(12)
    if action == 0:
        return struct.pack("<Q", rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))) + data[8:]
    if action == 1:
        entry["shape"] = rng.choice(
            (
                [10**12],
                [10**12, 10**12],
                [10**12, 0],
                [-8, -12],
                [12, 8],
                [96],
                [8, 12, 1],
                [1] * 5000,
                [10**4000] * 500,
                [2.0, 48],
                ["8", 12],
                96,
                None,
            )
        )
    elif action == 2:
        entry["data_offsets"] = header[other]["data_offsets"]
    elif action == 3:
        entry["data_offsets"] = [n + rng.choice((-8, -1, 1, 4, 8, 10**12)) for n in entry["data_offsets"]]
    elif action == 4:
        entry["dtype"] = rng.choice(("F64", "BF16", "I32", "F16", "C64", "f32", "", None, [], {}, 32))
    elif action == 5:
        text = json.dumps(header)[:-1] + f', "{name}": {json.dumps(entry)}}}'
        return struct.pack("<Q", len(text)) + text.encode() + body
    elif action == 6:
        header[rng.choice(("../x", "a\nb", "\ud800", "", name + ".bias", "x" * 5000))] = header.pop(name)
    elif action == 7:
        return data + rng.randbytes(rng.randrange(1, 100))
    elif action == 8:
        wide = b"[" + b"[]," * 3_000_000 + b"[]]"
        text = rng.choice((b"[" * 200_000, b"{" * 50, b"[]", b"null", b'{"a":' * 1000, wide))
        return struct.pack("<Q", len(text)) + text + body
    else:
        header = spoil_value(rng, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _plain(path):
    """False for a link to /proc/self/mem, which is a file that cannot be read."""
    return path.is_file() and not str(path.resolve()).startswith("/proc/")


def spoil_special(rng, folder, outside):
    """A file of the directory gives way to something that is not a regular file, or to a link that leads out."""
    victim = rng.choice(sorted(p for p in folder.rglob("*") if p.is_file()))
    content = victim.read_bytes()
    action = rng.randrange(9)
    if action < 8:
        victim.unlink()
    if action == 0:
        os.mkfifo(victim)
    elif action == 1:
        victim.mkdir()
    elif action == 2:
        victim.symlink_to(victim.name)
    elif action == 3:
        victim.symlink_to("/nowhere/at/all")
    elif action == 4:
        victim.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/random", "/proc/self/mem", "/dev/stdin")))
    elif action == 5:
        (outside / "linked").write_bytes(content)
        victim.symlink_to(outside / "linked")
    elif action == 6:
        victim.symlink_to(outside, target_is_directory=True)
    elif action == 7:
        with socket.socket(socket.AF_UNIX) as server:  # its path may not be long
            here = os.getcwd()
            os.chdir(victim.parent)
            server.bind(victim.name[:80])
            os.chdir(here)
    else:
        (folder / "loop").symlink_to(folder, target_is_directory=True)


def spoil_names(rng, folder):
    """More files, under names that no one expects."""
    for name in rng.sample(
        [
            b"a\nb.txt",
            b"\xff\xfe.txt",
            b"..x",
            b"-rf",
            b"\x1b[2J",
            b"x" * 255,
            b" ",
            b"con.json",
            b"'$(touch owned)'",
            b"*",
            b"model.safetensors.index.json.bak",
            b"pytorch_model.bin",
            b"kbne_edit.json.txt",
            b"\xe2\x80\xae.txt",
        ],
        3,
    ):
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            file.write(b"content")


# -------------------------------------------------------------------------------------------------------------- oracles


def contents(folder):
    """{path: bytes} of what a reader finds, links followed."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if _plain(p)}


def wrong_fold(base, out, factors):
    """None, or what is wrong with `out`, by safetensors' own reader and NumPy."""
    weights = {p.name for p in base.glob("*.safetensors")}
    for name, data in contents(out).items():
        if name in ("kbne_edit.json", "kbne_undo.kbne"):
            continue
        if name not in weights:
            if data != (base / name).read_bytes():
                return f"{name} was not carried over as it was"
            continue
        before, after = load_file(base / name), load_file(out / name)
        for key, expected in before.items():
            if match := _DOWN.fullmatch(key):
                for neuron, factor in factors.get(int(match[1]), {}).items():
                    expected[:, neuron] *= np.float32(factor)
            if key not in after or after[key].tobytes() != expected.tobytes():
                return f"{key} is not the product"
    return None


def _fold(case, source):
    out = case / "area" / "out"
    fold(source, Edit("down", FACTORS), out)
    return wrong_fold(source, out, FACTORS)


def _verify(case, base, baked, folder):
    if not verify(base, baked, behaviour=False).ok:
        return "found"
    same = contents(base) == contents(folder / "base") and contents(baked) == contents(folder / "baked")
    return None if same else "verify does not see the difference"


def _revert(case, baked, folder):
    out = case / "area" / "base"
    revert(baked, out)
    return None if contents(out) == contents(folder / "base") else "revert does not give the base"


def _edit(case, path, folder):
    edit, data = Edit.load(path), json.loads(path.read_text())
    expected = {int(la): {int(n): float(f) for n, f in ns.items()} for la, ns in data["factors"].items() if ns}
    if edit.factors != expected or edit.site != data["site"]:
        return "not the edit that the file holds"
    if edit.site != "down":
        return None
    return (
        wrong_fold(folder / "base", case / "area" / "out", expected)
        if fold(folder / "base", edit, case / "area" / "out")
        else "no manifest"
    )


def _recipe(case, path):
    recipe = load_recipe(path)
    requests = recipe.ask(len(recipe.questions))
    fine = all(isinstance(t, str) for q in requests for t in (q.text, q.answer, q.dimension, q.form))
    fine &= all(q.answer in recipe.answers for q in requests) and -1e6 <= recipe.factor <= 1e6
    return None if fine and yaml.safe_load(path.read_text())["name"] == recipe.name else "not what the recipe says"


def _scores(case, path):
    scores = load_scores(path)
    values, requests = load_file(path)["scores"], [i for i, q in enumerate(scores.questions) if not q.control]
    counts = {i: values[i] > np.float32(0.1) * max(values[i].max(), 0) for i in requests}
    kept = np.zeros(values.shape[1:], bool)
    for dimension in {scores.questions[i].dimension for i in requests}:
        rows = [counts[i] for i in requests if scores.questions[i].dimension == dimension]
        kept |= np.sum(rows, 0) >= max(0.1 * len(rows), 1)
    got = select(scores).factors
    return (
        None
        if got == {la: dict.fromkeys(np.flatnonzero(row).tolist(), 2.0) for la, row in enumerate(kept) if row.any()}
        else "not the selection"
    )


def mutant(seed, number, folder, case):
    """(kind, operation, command): mutant `number`, of KINDS in turn, laid out in `case`.

    operation() returns None if the result is right, "found" if a proof failed as it should, else what is wrong, or
    raises. command: the same through the command line. Both may write below case/area only.
    """
    kind, rng = KINDS[number % len(KINDS)], random.Random(f"{seed}/{number}")
    area = case / "area"
    area.mkdir(parents=True)
    (case / "outside").mkdir()
    change = functools.partial(_change, rng, folder, case)
    if kind == "edit":
        path = change("edit.json", spoil_text)
        command = ["bake", "--in", folder / "base", "--edit", path, "--dry-run", "--out", area / "out"]
        return kind, lambda: _edit(case, path, folder), command
    if kind == "recipe":
        path = change("recipe.yaml", _spoil_recipe if rng.random() < 0.7 else spoil_bytes)
        return kind, lambda: _recipe(case, path), ["recipes", "check", path]
    if kind == "scores":
        path = change("scores.safetensors", rng.choice((spoil_header, spoil_meta, spoil_bytes)))
        command = ["select", path, "--recipe", "demo", "--out", area / "edit.json", "--overwrite"]
        return kind, lambda: _scores(case, path), command
    base, baked, do = _spoil_directory(kind, rng, folder, case, change)
    if do == "fold":
        command = ["bake", "--in", base, "--edit", folder / "edit.json", "--no-behaviour", "--out", area / "out"]
        return kind, lambda: _fold(case, base), command
    if do == "revert":
        return kind, lambda: _revert(case, baked, folder), ["revert", baked, "--out", area / "base"]
    command = ["verify", "--in", base, "--baked", baked, "--no-behaviour"]
    return kind, lambda: _verify(case, base, baked, folder), command


def _spoil_directory(kind, rng, folder, case, change):
    """(base, baked, what to do): one of the two directories is a spoilt copy."""
    shards = [p.name for p in sorted((folder / "base").glob("*.safetensors"))]
    files = {
        "header": shards,
        "data": shards,
        "index": ["model.safetensors.index.json"],
        "config": ["config.json"],
        "baked header": shards,
        "manifest": ["kbne_edit.json"],
        "undo": ["kbne_undo.kbne"],
    }
    if kind in ("header", "data", "index", "config"):
        how = {"header": spoil_header, "data": spoil_bytes}.get(kind, spoil_text)
        return change("base", how, *files[kind]), folder / "baked", rng.choice(("fold", "fold", "verify"))
    if kind in files:
        do = rng.choice(("revert", "verify"))
        how = spoil_text if kind == "manifest" else rng.choice((spoil_header, spoil_bytes))
        baked = change("baked", how, *files[kind])
        if do == "revert" and rng.random() < 0.5:  # by someone who can compute the hashes
            reseal(baked)
        return folder / "base", baked, do
    which = rng.choice(("base", "baked"))
    target = change(which, lambda _, data: data, "config.json")
    if kind == "special":
        spoil_special(rng, target, case / "outside")
    else:
        spoil_names(rng, target)
    if which == "base":
        return target, folder / "baked", "fold"
    return folder / "base", target, rng.choice(("revert", "verify"))


def _change(rng, folder, case, source, how, *names):
    """A copy of a file or folder of the ground, in which the file (or one of `names`) is spoilt."""
    target = case / source
    (shutil.copytree if (folder / source).is_dir() else shutil.copyfile)(folder / source, target)
    path = target / rng.choice(names) if names else target
    path.write_bytes(how(rng, path.read_bytes()))
    return target


def _spoil_recipe(rng, data):
    """As JSON, which is YAML. The oracle reads YAML 1.1, which takes bare yes and no for booleans: they are quoted."""
    quoted = re.sub(rb"\b(yes|no)\b(?=[,}\]])", rb'"\1"', data)
    return spoil_text(rng, json.dumps(yaml.safe_load(quoted)).encode())


def model_mutant(seed, number, case):
    """As `mutant`, for what only transformers or torch read: tokenizer, configuration, .bin weights of the demo."""
    rng = random.Random(f"{seed}/model/{number}")
    (case / "area").mkdir(parents=True)
    model, name = case / "model", rng.choice(("tokenizer.json", "tokenizer_config.json", "config.json", "weights"))
    shutil.copytree(DEMO, model)
    if name == "weights":
        return _bin_mutant(rng, case, model)
    how = spoil_bytes if rng.random() < 0.2 else spoil_text
    (model / name).write_bytes(how(rng, (model / name).read_bytes()))

    def operation():
        scores = locate(str(model), case / "area" / "s.safetensors", Settings(recipe="demo", questions=9))
        return None if scores.values.shape[0] == 18 else "not 18 questions"

    return (
        name,
        operation,
        ["locate", "--in", model, "--recipe", "demo", "--questions", 9, "--out", case / "area" / "s"],
    )


def _bin_mutant(rng, case, model):
    import torch
    from safetensors.torch import load_file

    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    torch.save(weights, model / "pytorch_model.bin")
    (model / "pytorch_model.bin").write_bytes(spoil_bytes(rng, (model / "pytorch_model.bin").read_bytes()))

    def operation():
        with tempfile.TemporaryDirectory(dir=case / "area") as folder:
            tempfile.tempdir = folder
            try:
                with resolved(str(model)) as result:
                    got = load_file(result.path / "model.safetensors")
            finally:
                tempfile.tempdir = None
        # torch checks no sums: a flipped bit may be in a name or a weight, but nothing may be invented
        return None if len(got) <= len(weights) else "tensors that were not there"

    command = ["bake", "--in", model, "--edit", "nothing", "--dry-run", "--out", case / "area" / "out"]
    return "weights", operation, command


def spoil_meta(rng, data):
    """A scores file whose own metadata is wrong."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["kbne"] = json.dumps(spoil_value(rng, json.loads(header["__metadata__"]["kbne"])))
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def reseal(baked):
    """Make the manifest's own hash, and that of the undo file, right again."""
    try:
        manifest = read_manifest(baked)
        undo = sha256(baked / "kbne_undo.kbne") if manifest["undo"] else 0
        write_manifest(baked, {**manifest, "undo": undo})
    except (ValueError, TypeError, KeyError, RecursionError):
        pass  # no longer a manifest
