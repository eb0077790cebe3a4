"""Manifests forged by someone who can compute hashes: one field changed, the whole sealed again.

Every field has its turn, with values that its type could have, and files are put in place of the base's as an attacker
would: the real one moved aside under a name that the manifest calls the base's.
"""

import json
import random
import shutil

from manifests import read_manifest, sha256, write_manifest

FILES = ("tokenizer.json", "config.json", "generation_config.json", "chat_template.jinja", "own.py", "README.md")


def paths(data, path=()):
    """Every place in JSON data, the root left out."""
    entries = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from paths(value, (*path, key))


def other(rng, value):
    """Another value of the same type, as far as there is one."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, -value - 1, value * 3 + 1))
    if isinstance(value, str):
        return rng.choice((value[:-1] + ("0" if value[-1:] != "0" else "1"), "0" * 64, "kbne-edit 0.1.1", ""))
    if isinstance(value, list):
        return rng.choice((value[:-1], [*value, "more"])) if value else ["more"]
    if isinstance(value, dict):
        return {**value, "more": 1}
    return "0" * 64


def forge_field(rng, baked, path=None):
    """Change, drop or rename one field, and seal. path: which one. Returns what was done."""
    manifest = read_manifest(baked)
    del manifest["sha256"]
    before = json.dumps(manifest)
    path = path or rng.choice(list(paths(manifest)))
    holder = manifest
    for key in path[:-1]:
        holder = holder[key]
    way = rng.choice(("value", "value", "value", "null", "drop", "rename"))
    if way == "drop":
        del holder[path[-1]]
    elif way == "rename" and isinstance(holder, dict):
        holder[f"{path[-1]}0"] = holder.pop(path[-1])
    elif way == "null" and holder[path[-1]] is not None:
        holder[path[-1]] = None
    else:
        way = "value"
        holder[path[-1]] = other(rng, holder[path[-1]])
    if json.loads(json.dumps(manifest)) == json.loads(before):
        return forge_field(rng, baked, path)
    write_manifest(baked, manifest)
    return f"{way} {'.'.join(map(str, path))}"


def forge_file(rng, baked, name=None):
    """A foreign file, declared as made while baking, or in place of the base's own, which is moved aside."""
    manifest, name = read_manifest(baked), name or rng.choice(FILES)
    path = baked / name
    if path.is_file() and rng.random() < 0.8:
        side = rng.choice((f"{name}.orig.txt", "LICENSE.txt", "README.base.md"))
        path.rename(baked / side)
        manifest["files"][side] = manifest["files"].pop(name) | {"base": name}
    path.write_bytes(b"forged by someone who can compute hashes\n")
    manifest["files"][name] = {"in": rng.choice((None, sha256(path))), "out": sha256(path)}
    manifest["files"] = dict(sorted(manifest["files"].items()))
    write_manifest(baked, manifest)
    return f"foreign {name}"


def forge(rng, baked):
    return forge_file(rng, baked) if rng.random() < 0.2 else forge_field(rng, baked)


def forgery_case(seed, pairs):
    """case_of for `faults.judged`: a forged copy that verify must not accept. pairs: [(base, output), …]"""
    from kbne_edit import KbneError, verify

    def case_of(number, case):
        rng = random.Random(f"{seed}/forgery/{number}")
        (case / "area").mkdir()
        base, out = pairs[number % len(pairs)]
        forged = shutil.copytree(out, case / "forged")
        what = forge(rng, forged)

        def judge():
            try:
                return f"WRONG: not found: {what}" if verify(base, forged, behaviour=False).ok else "found"
            except KbneError:
                return "refused"

        return what, judge

    return case_of
