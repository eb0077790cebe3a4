"""To and from the Hub: the real client, as separate processes, against a server on this machine (tests/hub.py)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from manifests import write_manifest
from printed import parsed
from safetensors.torch import load_file, save_file

from hub import SIGNATURE, Fault, serving, sha256
from kbne_edit import Edit
from kbne_edit.hub.client import without_password
from tiny import tiny_model

CLI = Path(__file__).resolve().parent.parent / "cli.py"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz012345"  # made up; must not leak either
README = b"---\nlicense: apache-2.0\nlanguage: [en, de]\ntags: [chat]\n---\n# Tiny\n"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """{file: bytes} of a tiny model in two shards, with a card."""
    folder = tmp_path_factory.mktemp("content")
    tiny_model("llama", torch.bfloat16).save_pretrained(folder, max_shard_size="30KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": README}


@pytest.fixture(scope="module")
def server():
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server):
    server.repos.clear(), server.store.clear(), server.faults.clear(), server.requests.clear(), server.readers.clear()
    server.tokens = {TOKEN: ("ada", ("org",), True)}
    return server


def _process(*command, cwd, endpoint, token=None):
    """A process with one Hub, in a home of its own; nothing secret may be said."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    kept |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cwd / "home"), "HF_HUB_DISABLE_XET": "1"}
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=kept | ({"HF_TOKEN": token} if token else {}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert TOKEN not in result.stdout + result.stderr and SIGNATURE not in result.stdout + result.stderr
    return result


@pytest.fixture
def cli(hub, tmp_path):
    return lambda *args, endpoint=hub.url, **kw: _process(CLI, *args, cwd=tmp_path, endpoint=endpoint, **kw)


@pytest.fixture
def edit(tmp_path):
    Edit("down", {1: {5: 2.0, 9: 2.0}}).save(tmp_path / "edit.json")
    return "edit.json"


@pytest.fixture
def bake(cli, edit):
    """`bake` of what lies on the Hub, without the model: what is downloaded is the same."""
    return lambda source, **kw: cli("bake", "--in", source, "--edit", edit, "--out", "out", "--no-behaviour", **kw)


# The network or the Hub failed, and nothing that was asked is wrong.
FAILING = ("the Hub answers", "cannot be reached", "HF_HUB_OFFLINE is set")


def _refused(result, *parts, status=2):
    status = 3 if any(text in result.stderr for text in FAILING) else status
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == status and len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    assert all(part in lines[0] for part in parts), lines[0]


# ---------------------------------------------------------------------------------------------------------- download


def test_downloads_only_what_is_needed_and_pins_the_commit(hub, bake, content, tmp_path):
    other = {
        name: b"the same weights once more"
        for name in (
            "original/consolidated.00.pth",
            "original/params.json",
            "onnx/model.onnx",
            "consolidated.safetensors",
            "pytorch_model.bin",
            "pytorch_model-00001-of-00002.bin",
            "pytorch_model.bin.index.json",
            "picture.png",
            "model.fp16.safetensors",
            "model.gguf",
            ".gitattributes",
        )
    }
    carried = {"LICENSE": b"free", "additional_chat_templates/tool.jinja": b"{{ x }}"}
    commit = hub.add("org/tiny", content | other | carried)
    result = bake("org/tiny")
    assert result.returncode == 0, result.stderr
    assert commit in result.stderr
    fetched = {path.split(f"{commit}/")[1] for path in hub.paths("HEAD", "/resolve/")}
    assert fetched == {*content, *carried}
    manifest = json.loads((tmp_path / "out" / "kbne_edit.json").read_text())
    assert manifest["source"] == {"id": "org/tiny", "commit": commit}
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_bytes() == b"{{ x }}"
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"free"
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    # Another program downloads all of it into the same cache: the same command makes the same directory.
    code = "import huggingface_hub; huggingface_hub.snapshot_download('org/tiny')"
    assert _process("-c", code, cwd=tmp_path, endpoint=hub.url).returncode == 0
    assert next((tmp_path / "home").rglob("picture.png")).is_file()
    shutil.rmtree(tmp_path / "out")
    assert bake("org/tiny").returncode == 0
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}


def test_a_revision_is_taken_as_it_was(hub, bake, content, tmp_path):
    first = hub.add("org/tiny", content | {"NOTE.txt": b"first"})
    hub.repos["org/tiny"].commit(content | {"NOTE.txt": b"second"})
    assert bake(f"org/tiny@{first[:40]}").returncode == 0
    assert (tmp_path / "out" / "NOTE.txt").read_text() == "first"
    assert json.loads((tmp_path / "out" / "kbne_edit.json").read_text())["source"]["commit"] == first


def test_a_single_file_is_preferred_to_shards(hub, bake, content, tmp_path):
    whole = tmp_path / "model.safetensors"
    shards = [name for name in content if name.endswith(".safetensors")]
    for name in shards:
        (tmp_path / name).write_bytes(content[name])
    weights = {k: v for name in shards for k, v in load_file(tmp_path / name).items()}
    save_file(weights, whole, metadata={"format": "pt"})
    hub.add("org/both", content | {"model.safetensors": whole.read_bytes()})
    result = bake("org/both")
    assert result.returncode == 0, result.stderr
    assert len(hub.paths("GET", "/cdn/")) == 1
    assert sorted(p.name for p in (tmp_path / "out").glob("model*")) == ["model.safetensors"]


def test_a_cut_connection_is_resumed(hub, bake, tmp_path):
    """The client keeps what it has in steps of 10 MiB, so the file is larger than that."""
    tiny_model("llama", torch.bfloat16).save_pretrained(tmp_path / "big")
    weights = load_file(tmp_path / "big" / "model.safetensors")
    weights["extra.weight"] = torch.randn(3 << 20, generator=torch.Generator().manual_seed(0))
    save_file(weights, tmp_path / "big" / "model.safetensors", metadata={"format": "pt"})
    hub.add("org/big", {path.name: path.read_bytes() for path in (tmp_path / "big").iterdir()})
    hub.faults.append(Fault("GET /cdn/", cut=11 << 20, times=1))
    result = bake("org/big")
    assert result.returncode == 0, result.stderr
    ranges = [span for _, path, span, _ in hub.requests if "/cdn/" in path]
    assert ranges == [None, f"bytes={10 << 20}-"]
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(got["extra.weight"], weights["extra.weight"])


def test_a_second_run_fetches_only_what_the_first_did_not(hub, bake, content):
    hub.add("org/tiny", content)
    last = sha256(content[max(name for name in content if name.endswith(".safetensors"))])
    hub.faults.append(Fault(f"GET /cdn/{last}", status=502))
    _refused(bake("org/tiny"), "502")
    done = {path for path in hub.paths("GET", "/cdn/") if last not in path}
    hub.faults.clear(), hub.requests.clear()
    assert bake("org/tiny").returncode == 0
    again = set(hub.paths("GET", "/cdn/"))
    assert f"/cdn/{last}" in again and done and not done & again


def test_bin_weights_alone_are_converted(hub, bake, content, tmp_path):
    states = [{}, {}]
    for number, name in enumerate(sorted(name for name in content if name.endswith(".safetensors"))):
        (tmp_path / name).write_bytes(content[name])
        states[number % 2] |= load_file(tmp_path / name)
    files = {name: data for name, data in content.items() if "safetensors" not in name}
    index = {"weight_map": {}}
    for number, state in enumerate(states):
        name = f"pytorch_model-{number + 1:05}-of-00002.bin"
        torch.save(state, tmp_path / name)
        files[name] = (tmp_path / name).read_bytes()
        index["weight_map"] |= dict.fromkeys(state, name)
    files["pytorch_model.bin.index.json"] = json.dumps(index).encode()
    hub.add("org/bin", files | {"tf_model.h5": b"x", "additional_chat_templates/tool.jinja": b"{{ x }}"})
    result = bake("org/bin")
    assert result.returncode == 0, result.stderr
    got = {k: v for path in (tmp_path / "out").glob("model-*.safetensors") for k, v in load_file(path).items()}
    assert got.keys() == {**states[0], **states[1]}.keys()
    differ = [k for k, v in (states[0] | states[1]).items() if not torch.equal(got[k], v)]
    assert differ == ["model.layers.1.mlp.down_proj.weight"]
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").is_file()
    hub.repos["org/bin"].commit({k: v for k, v in files.items() if k != "pytorch_model-00002-of-00002.bin"})
    shutil.rmtree(tmp_path / "out")
    _refused(bake("org/bin"), "pytorch_model-00002-of-00002.bin", "is missing")


def test_metas_first_releases_have_a_sibling(hub, bake, content, tmp_path):
    hub.add("meta-llama/Llama-2-7b", {"consolidated.00.pth": b"x", "params.json": b"{}", "README.md": b"x"})
    commit = hub.add("meta-llama/Llama-2-7b-hf", content)
    result = bake("meta-llama/Llama-2-7b")
    assert result.returncode == 0, result.stderr
    assert "taking meta-llama/Llama-2-7b-hf" in result.stderr
    assert json.loads((tmp_path / "out" / "kbne_edit.json").read_text())["source"] == {
        "id": "meta-llama/Llama-2-7b-hf",
        "commit": commit,
    }
    assert not hub.paths("GET", "/resolve/main/consolidated.00.pth") and not hub.paths("HEAD", "consolidated")


def test_gated_and_private_models(hub, bake, content, tmp_path):
    hub.add("org/gated", content, gated=True)
    hub.add("org/private", content, private=True)
    hub.tokens["hf_other"] = ("eve", (), True)
    for token in (None, "hf_other"):
        _refused(bake("org/gated", token=token), "is gated", f"{hub.url}/org/gated", "hf auth login")
        _refused(bake("org/private", token=token), "org/private", "if it is private, log in", "hf auth login")
    hub.readers.add("ada")
    for name in ("org/gated", "org/private"):
        result = bake(name, token=TOKEN)
        assert result.returncode == 0, result.stderr
        shutil.rmtree(tmp_path / "out")


def test_one_clear_line_for_each_refusal(hub, bake, content, tmp_path):
    hub.add("org/tiny", content)
    _refused(bake("org/nothing"), "neither a local directory nor a model on the Hub", "spelling")
    _refused(bake("org/tiny@v9"), "org/tiny has no revision v9", "/commits/main")
    _refused(bake("org/-tiny-"), "neither a directory nor a Hub id")
    _refused(bake("org/tiny", token="hf_expired"), "refuses your token", "hf auth login")
    for status, part in ((429, "in 7 seconds"), (500, "a fault on its side"), (503, "later"), (403, "read access")):
        hub.faults[:] = [Fault("GET /api/models/org/tiny", status=status, headers={"Retry-After": "7"})]
        _refused(bake("org/tiny"), part, str(status) if status != 403 else "token")
    hub.faults.clear()
    _refused(bake("org/tiny", endpoint="http://127.0.0.1:9"), "cannot be reached", "http://127.0.0.1:9", "network")
    for name, files, part in (
        ("org/gguf", {"model.gguf": b"x"}, "GGUF"),
        ("org/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}, "merge it"),
        ("org/text", {"config.json": b"{}"}, "no transformers weights"),
    ):
        hub.add(name, files)
        _refused(bake(name), name, part)
    assert not (tmp_path / "out").exists()


def test_what_is_in_the_cache_needs_no_network(hub, bake, content, tmp_path):
    commit = hub.add("org/tiny", content)
    assert bake("org/tiny").returncode == 0
    for endpoint, fault in (("http://127.0.0.1:9", []), (hub.url, [Fault("GET", status=503)])):
        hub.faults[:] = fault
        shutil.rmtree(tmp_path / "out")
        result = bake("org/tiny", endpoint=endpoint)
        assert result.returncode == 0 and f"in the cache, commit {commit}" in result.stderr, result.stderr
    next((tmp_path / "home").rglob("model-00002*.safetensors")).unlink()
    shutil.rmtree(tmp_path / "out")
    _refused(bake("org/tiny"), "503")


def test_the_cache_does_not_stand_in_for_a_right(hub, bake, content, tmp_path):
    hub.add("org/private", content, private=True)
    assert bake("org/private", token=TOKEN).returncode == 0
    shutil.rmtree(tmp_path / "out")
    _refused(bake("org/private"), "if it is private, log in")


# ------------------------------------------------------------------------------------------------------------- push

LOGITS = """
import json, sys, torch
from transformers import AutoModelForCausalLM
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name).eval()
    print(json.dumps(model(torch.tensor([[5, 17, 40, 8, 22, 31, 9, 60]])).logits.tolist()))
"""


@pytest.fixture(scope="module")
def proven(server, content, tmp_path_factory):
    """What `bake --in org/tiny` makes, with both proofs."""
    folder = tmp_path_factory.mktemp("proven")
    server.faults.clear()
    server.add("org/tiny", content)
    Edit("down", {1: {5: 2.0, 9: 2.0}}).save(folder / "edit.json")
    command = [CLI, "bake", "--in", "org/tiny", "--edit", "edit.json", "--out", "out"]
    result = _process(*command, cwd=folder, endpoint=server.url)
    assert result.returncode == 0, result.stderr
    return folder / "out"


@pytest.fixture
def out(proven, tmp_path):
    shutil.copytree(proven, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.slow
def test_from_the_hub_to_the_hub(out, hub, cli, content, tmp_path):
    """bake --in org/tiny, push, and a plain from_pretrained in another process that knows the name only."""
    hub.add("org/tiny", content)
    result = cli("push", "out", "org/other", "--json", token=TOKEN)
    assert result.returncode == 0, result.stderr
    answer = parsed("push", result.stdout)
    assert answer["url"] == f"{hub.url}/org/other" and answer["commit"] == hub.repos["org/other"].refs["main"]
    local = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*")}
    assert any("/api/validate-yaml" in path for path in hub.paths("POST", "/api/"))
    assert {k: v for k, v in hub.repos["org/other"].files.items() if k != ".gitattributes"} == local
    assert not hub.repos["org/other"].private
    card = ModelCard(hub.repos["org/other"].files["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("org/tiny", "finetune")
    assert (card.data.license, card.data.language, card.data.tags[0]) == ("apache-2.0", ["en", "de"], "chat")
    assert hub.repos["org/other"].files["README.base.md"] == README
    loaded = _process("-c", LOGITS, "org/other", "out", "org/tiny", cwd=tmp_path, endpoint=hub.url)
    assert loaded.returncode == 0, loaded.stderr
    there, here, base = map(json.loads, loaded.stdout.splitlines())
    assert there == here != base


def test_dry_run_sends_nothing(out, hub, cli):
    result = cli("push", "out", "org/other", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert all(f"  {p.name}: {p.stat().st_size:,} bytes\n" in result.stdout for p in out.iterdir())
    assert hub.requests == []


def test_private_and_proposed(out, hub, cli, content):
    assert cli("push", "out", "ada/mine", "--private", token=TOKEN).returncode == 0
    assert hub.repos["ada/mine"].private
    sent = len(hub.paths("PUT", "/store/"))
    assert sent == len(list(out.glob("*.safetensors")))
    hub.add("far/away", {"config.json": content["config.json"]})
    _refused(cli("push", "out", "far/away", token=TOKEN), "may not write", "write access to far")
    result = cli("push", "out", "far/away", "--create-pr", token=TOKEN)
    assert result.returncode == 0 and f"proposed: {hub.url}/far/away/discussions/1" in result.stdout, result.stderr
    assert list(hub.repos["far/away"].files) == ["config.json"]
    assert "kbne_edit.json" in hub.repos["far/away"].commits[hub.repos["far/away"].refs["refs/pr/1"]]
    assert len(hub.paths("PUT", "/store/")) == sent  # the store has those weights already
    hub.add("org/public", {"config.json": b"{}"})
    _refused(cli("push", "out", "org/public", "--private", token=TOKEN), "is public")


@pytest.mark.parametrize("name", ["kbne_undo.kbne", "config.json", "model-00001-of-00003.safetensors"])
def test_a_hub_that_alters_a_byte_is_found_out(name, out, hub, cli):
    name = name if (out / name).is_file() else min(path.name for path in out.glob("model-*.safetensors"))
    hub.altering.add(name)
    try:
        _refused(cli("push", "out", "org/other", token=TOKEN), f"does not hold {name} as it was sent")
    finally:
        hub.altering.clear()


def test_a_push_goes_on_where_it_was_cut(out, hub, cli):
    shard = sha256(max(out.glob("model-*.safetensors")).read_bytes())
    hub.faults.append(Fault(f"PUT /store/{shard}", status=403))
    _refused(cli("push", "out", "org/other", token=TOKEN), "may not write")
    assert list(hub.repos["org/other"].files) == [".gitattributes"]  # nothing half done is to be seen
    done = {path for path in hub.paths("PUT", "/store/") if shard not in path}
    hub.faults.clear(), hub.requests.clear()
    assert cli("push", "out", "org/other", token=TOKEN).returncode == 0
    again = set(hub.paths("PUT", "/store/"))
    assert f"/store/{shard}" in again and done and not done & again


def _add(path, data=b"x"):
    path.write_bytes(data)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


def _manifest(out, change):
    manifest = json.loads((out / "kbne_edit.json").read_text())
    change(manifest)
    write_manifest(out, manifest)  # sealed again: what it says must be refused, not that it was changed


SPOILT = {
    "weights": (2, "changed after baking", lambda out: _flip(max(out.glob("model-*.safetensors")))),
    "configuration": (2, "changed after baking", lambda out: _add(out / "config.json", b'{"a": 1}')),
    "undo": (2, "kbne_undo.kbne", lambda out: _flip(out / "kbne_undo.kbne")),
    "missing": (2, "generation_config.json is missing", lambda out: (out / "generation_config.json").unlink()),
    "other weights": (2, "pytorch_model.bin is not in the manifest", lambda out: _add(out / "pytorch_model.bin")),
    "unknown": (2, "secrets.txt is not in the manifest", lambda out: _add(out / "secrets.txt")),
    "no manifest": (2, "has no kbne_edit.json", lambda out: (out / "kbne_edit.json").unlink()),
    "manifest": (
        2,
        "kbne_edit.json was changed",
        lambda out: (out / "kbne_edit.json").write_text((out / "kbne_edit.json").read_text() + "\n"),
    ),
    "no proof": (
        1,
        "the model behaves as the hooks",
        lambda out: _manifest(out, lambda m: m["proofs"].update(behaviour=None)),
    ),
    "failed proof": (
        1,
        "the model behaves as the hooks",
        lambda out: _manifest(out, lambda m: m["proofs"]["behaviour"][0].update(ok=False)),
    ),
    "failed file proof": (
        1,
        "the files hold the edit",
        lambda out: _manifest(out, lambda m: m["proofs"].update(file_proof=False)),
    ),
    "damaged proof": (2, "damaged", lambda out: _manifest(out, lambda m: m.update(proofs=[3]))),
}


@pytest.mark.parametrize("case", SPOILT)
def test_only_what_was_proven_is_pushed(case, out, hub):
    """In this process, for speed: nothing is asked of the Hub before the directory is in order."""
    from kbne_edit import KbneError, push

    status, message, spoil = SPOILT[case]
    spoil(out)
    with pytest.raises(KbneError, match=message) as caught:
        push(out, "org/other")
    assert caught.value.exit_code == status and hub.requests == []


@pytest.fixture(scope="module")
def alone(proven, server, content):
    """The same edit as an adapter and as a delta, and what `apply` makes of the latter."""
    server.faults.clear()
    server.add("org/tiny", content)
    for form in ("peft", "delta"):
        command = [CLI, "bake", "--in", "org/tiny", "--edit", "edit.json", "--as", form, "--out", form]
        result = _process(*command, cwd=proven.parent, endpoint=server.url)
        assert result.returncode == 0, result.stderr
    command = [CLI, "apply", "delta", "--in", "org/tiny", "--out", "applied"]
    result = _process(*command, cwd=proven.parent, endpoint=server.url)
    assert result.returncode == 0, result.stderr
    return proven.parent


ADAPTED = """
import json, sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
ids = torch.tensor([[5, 17, 40, 8, 22, 31, 9, 60]])
base = AutoModelForCausalLM.from_pretrained("org/tiny").eval()
for model in (AutoPeftModelForCausalLM.from_pretrained(sys.argv[1]), PeftModel.from_pretrained(base, sys.argv[1])):
    print(json.dumps(model.eval()(ids).logits.tolist()))
"""


@pytest.mark.slow
def test_an_adapter_from_the_hub(alone, hub, cli, content, tmp_path):
    """PEFT in another process, which knows the name alone and finds the base by it: the checkpoint's logits."""
    commit = hub.add("org/tiny", content)
    hub.repos["org/tiny"].commit(content | {"NOTE.txt": b"a later commit"})
    result = cli("push", alone / "peft", "org/adapter", "--json", token=TOKEN)
    assert result.returncode == 0, result.stderr
    assert parsed("push", result.stdout)["notices"] == []
    sent = {k: v for k, v in hub.repos["org/adapter"].files.items() if k != ".gitattributes"}
    assert sent == {path.name: path.read_bytes() for path in (alone / "peft").iterdir()}
    card = ModelCard(sent["README.md"].decode()).data
    assert (card.base_model, card.base_model_relation, card.library_name) == ("org/tiny", "adapter", "peft")
    assert (card.license, card.tags) == ("apache-2.0", ["chat", "ia3", "kbne-edit"])  # no verdict passes
    config = json.loads(sent["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", commit)
    adapted = _process("-c", ADAPTED, "org/adapter", cwd=tmp_path, endpoint=hub.url)
    assert adapted.returncode == 0, adapted.stderr
    loaded = _process("-c", LOGITS, alone / "out", "org/tiny", cwd=tmp_path, endpoint=hub.url)
    assert loaded.returncode == 0, loaded.stderr
    actual, again = map(json.loads, adapted.stdout.splitlines())
    baked, base = map(json.loads, loaded.stdout.splitlines())
    assert actual == again == baked != base


def test_a_delta_from_the_hub(alone, hub, cli, content, tmp_path):
    hub.add("org/tiny", content)
    assert cli("push", alone / "delta", "org/delta", token=TOKEN).returncode == 0
    card = ModelCard(hub.repos["org/delta"].files["README.md"].decode())
    assert (card.data.base_model, card.data.base_model_relation) == ("org/tiny", "adapter")
    code = "import huggingface_hub as h; h.snapshot_download('org/delta', local_dir='delta')"
    assert _process("-c", code, cwd=tmp_path, endpoint=hub.url).returncode == 0
    (command,) = (line for line in card.text.splitlines() if line.startswith("kbne-edit "))
    result = cli(*command.split()[1:], "--no-behaviour")  # as the card says it, with "--in org/tiny@COMMIT"
    assert result.returncode == 0, result.stderr
    for path in (alone / "out").glob("*.safetensors"):
        assert (tmp_path / "model" / path.name).read_bytes() == path.read_bytes()
    _refused(cli("push", "model", "org/other", token=TOKEN), "the model behaves as the hooks", status=1)


def test_what_was_applied_is_pushed_as_what_was_baked(alone, hub, cli):
    result = cli("push", alone / "applied", "org/other", token=TOKEN)
    assert result.returncode == 0 and "both proofs are on record" in result.stdout, result.stderr
    sent = hub.repos["org/other"].files
    assert ModelCard(sent["README.md"].decode()).data.base_model == "org/tiny"
    assert {k: v for k, v in sent.items() if k != ".gitattributes"} == {
        path.name: path.read_bytes() for path in (alone / "out").iterdir()
    }


SPOILT_ALONE = {
    "weights": ("was changed", lambda folder, file: _flip(folder / file)),
    "missing": ("is missing", lambda folder, file: (folder / file).unlink()),
    "card": ("README.md was changed", lambda folder, _: _flip(folder / "README.md")),
    "unknown": ("secrets.txt is not in the manifest", lambda folder, _: _add(folder / "secrets.txt")),
    "other weights": ("is not in the manifest", lambda folder, _: _add(folder / "adapter_model.bin")),
    "no manifest": ("has no kbne_edit.json", lambda folder, _: (folder / "kbne_edit.json").unlink()),
    "manifest": (
        "kbne_edit.json was changed",
        lambda folder, _: (folder / "kbne_edit.json").write_text((folder / "kbne_edit.json").read_text() + "\n"),
    ),
    "other files": (
        "damaged",
        lambda folder, _: _manifest(folder, lambda m: m["files"].update({"x.bin": {"in": None, "out": sha256(b"x")}})),
    ),
    "other form": ("damaged", lambda folder, _: _manifest(folder, lambda m: m.update(form="gguf"))),
    "no source": ("damaged", lambda folder, _: _manifest(folder, lambda m: m.pop("source"))),
}


@pytest.mark.parametrize("case", SPOILT_ALONE)
@pytest.mark.parametrize("form, file", [("peft", "adapter_model.safetensors"), ("delta", "kbne_delta.kbne")])
def test_an_edit_alone_is_pushed_as_it_was_written(form, file, case, alone, hub, tmp_path):
    from kbne_edit import KbneError, push

    shutil.copytree(alone / form, tmp_path / "copy")
    message, spoil = SPOILT_ALONE[case]
    spoil(tmp_path / "copy", file)
    with pytest.raises(KbneError, match=message) as caught:
        push(tmp_path / "copy", "org/other")
    assert caught.value.exit_code == 2 and hub.requests == []


def test_a_checkpoint_does_not_pass_for_an_adapter(out, hub):
    """Nothing that lacks its proofs is pushed by another name."""
    from kbne_edit import KbneError, push

    _manifest(out, lambda m: m.update(form="peft", proofs=None))
    with pytest.raises(KbneError, match="damaged"):
        push(out, "org/other")


def test_refusals_of_a_push(out, hub, cli):
    _refused(cli("push", "out", "org/other"), "not logged in", "hf auth login")
    _refused(cli("push", "out", "org/other", token="hf_expired"), "refuses your token", "hf auth login")
    hub.tokens["hf_reader"] = ("eve", (), False)
    _refused(cli("push", "out", "org/other", token="hf_reader"), "may not write", "write access to org")
    _refused(cli("push", "out", "other", token=TOKEN), "give ORG/NAME")
    hub.faults.append(Fault("POST /api/models/.*/commit", status=503))
    _refused(cli("push", "out", "org/other", token=TOKEN), "503", "a fault on its side")
    hub.faults.clear()
    hub.add("org/old", {"pytorch_model.bin": b"other weights"})
    _refused(cli("push", "out", "org/old", token=TOKEN), "holds other weights already (pytorch_model.bin)")


def test_the_base_is_not_overwritten(out, hub, cli):
    _refused(cli("push", "out", "org/tiny", token=TOKEN), "is the base itself", "--create-pr")


def test_a_password_in_the_address_is_not_shown():
    assert without_password("https://me:se@cret@hub.local:1/api") == "https://hub.local:1/api"
    assert without_password("https://hub.local/a@b") == "https://hub.local/a@b"
    assert without_password("me:secret@hub.local") == "hub.local"
