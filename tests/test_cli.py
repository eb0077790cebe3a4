"""The command line: the main job on the demo model, and one clear line for each wrong input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command import run_command as run
from huggingface_hub import ModelCard
from printed import parsed
from safetensors.torch import load_file, save_file

from hub import card_faults
from kbne_edit import Edit, Output, Rule, bake, fold, load_scores, locate, select
from kbne_edit.commands import options
from kbne_edit.errors import ScoresError
from kbne_edit.locating import Settings
from kbne_edit.selection.questions import Questions
from tiny import tiny_model

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "kbne_edit" / "demo"


def files(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def baked(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baked")
    result = run("bake", "--in", "demo", "--out", "debiased", "--json", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder, parsed("bake", result.stdout)


def test_bake_of_the_demo(baked):
    folder, summary = baked
    assert summary["proofs"]["ok"] and all(entry["bit_equal"] for entry in summary["proofs"]["behaviour"])
    assert summary["attribution"]["right"] >= 40 and summary["attribution"]["largest_residual"] <= 0.01
    assert summary["neurons"] == summary["selection"]["neurons"] > 0
    assert summary["effect"]["mean_abs_margin"][0] > 0.05  # the model is biased, whatever the edit did
    scores = load_scores(folder / "debiased.work" / "scores.safetensors")
    assert scores.values.shape == (90, 4, 192)


def test_the_same_input_gives_the_same_bytes(baked, tmp_path):
    folder, _ = baked
    assert run("bake", "--in", "demo", "--out", "debiased", cwd=tmp_path).returncode == 0
    assert files(tmp_path / "debiased") == files(folder / "debiased")


def test_plain_transformers_in_a_second_process(baked):
    folder, _ = baked
    code = (
        "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T; A.from_pretrained('debiased'); "
        "print(len(T.from_pretrained('debiased')('the zorn')['input_ids']))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.stdout.strip() == "3", result.stderr


def test_revert_restores_the_base(baked, tmp_path):
    folder, _ = baked
    reverted = run("revert", folder / "debiased", "--out", tmp_path / "base", "--json", cwd=tmp_path)
    assert reverted.returncode == 0 and parsed("revert", reverted.stdout)["files"] > 0
    assert files(tmp_path / "base") == files(DEMO)


def test_the_card_says_what_was_measured(baked):
    folder, summary = baked
    card, effect, selection = ModelCard.load(folder / "debiased" / "README.md"), summary["effect"], summary["selection"]
    assert card.data.eval_results is None  # no effect was shown: a flattening does as much
    assert not card_faults(card.data.to_dict()) and "base_model" not in card.data.to_dict()  # demo is not on the Hub
    mean, low, high = effect["change_abs"]
    assert f"| this edit | {mean:+.4f} | {low:+.4f} to {high:+.4f} |" in card.text
    assert f"{selection['controls_overlap']} of the {selection['neurons']} are selected by unrelated" in card.text
    assert summary["verdict"]["reasons"]["effect"] in card.text and summary["verdict"]["effect"] == "NO EVIDENCE"


def test_select_again_takes_no_model(baked, tmp_path):
    folder, _ = baked
    code = (
        "import sys; sys.argv[0] = 'kbne-edit'; from kbne_edit.commands import cli; cli(standalone_mode=False); "
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    scores = folder / "debiased.work" / "scores.safetensors"
    result = subprocess.run(
        [sys.executable, "-c", code, "select", scores, "--tau", "0.02", "--out", tmp_path / "e.json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert Edit.load(tmp_path / "e.json").num_neurons > Edit.load(folder / "debiased.work" / "edit.json").num_neurons


def test_select_by_other_rules(baked, tmp_path):
    path = baked[0] / "debiased.work" / "scores.safetensors"
    result = run("select", path, "--rule", "specific", "--top", "0.01", "--out", "e.json", "--json", cwd=tmp_path)
    actual, edit = parsed("select", result.stdout), Edit.load(tmp_path / "e.json")
    assert edit.factors == select(load_scores(path), Rule("specific", top=0.01)).factors
    assert 0 < edit.num_neurons <= 3 * round(0.01 * 4 * 192)
    again = ["select", path, "--rule", "specific", "--top", "0.01", "--out", "e.json"]
    refused = run(*again, cwd=tmp_path)
    assert refused.returncode == 2 and "e.json exists: choose another --out, or pass --overwrite" in refused.stderr
    reply = run(*again, "--overwrite", cwd=tmp_path).stdout
    shared, total = (sum(column) for column in zip(*actual["unseen"], strict=True))
    assert f"held-out controls: {shared / total:.0%} [" in reply
    assert run("bake", "--in", "demo", "--edit", "e.json", "--no-behaviour", "--out", "o", cwd=tmp_path).returncode == 0
    assert run("report", "o", "--scores", path, "--out", "r.html", cwd=tmp_path).returncode == 0
    assert "rule specific, the largest 1.000% of all neurons, union" in (tmp_path / "r.html").read_text("utf-8")
    for wrong, cure in (("--rule specific --tau 0.1", "--top"), ("--rule paired", "twin")):
        result = run("select", path, *wrong.split(), "--out", "f.json", cwd=tmp_path)
        assert result.returncode == 2 and cure in result.stderr and "Traceback" not in result.stderr
        assert not (tmp_path / "f.json").exists()


def test_select_by_some_dimensions(baked, tmp_path):
    """The same as a selection from those questions' scores, with the others never there."""
    folder, _ = baked
    path = folder / "debiased.work" / "scores.safetensors"
    scores = load_scores(path)
    kept = [i for i, q in enumerate(scores.questions) if q.dimension in ("clan", "guild") and not q.control]
    about = [scores.questions[i].dimension for i in kept]
    result = run("select", path, "--dimensions", "clan, guild", "--out", "e.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (
        Edit.load(tmp_path / "e.json").factors
        == select(Questions.of_arrays(scores.values[kept], dimensions=about)).factors
    )
    result = run("select", path, "--dimensions", "guild,clans", "--out", "f.json", cwd=tmp_path)
    assert result.returncode == 2 and "no question is of clans: there are clan, guild, village" in result.stderr


def test_help_does_not_import_torch():
    code = (
        "import sys; from kbne_edit.commands import cli; cli(['bake', '--help'], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0 and "--factor" in result.stdout, result.stderr


def test_scores_of_other_settings_are_kept_and_found_again(tmp_path, capsys, shown):
    def run(**settings):
        bake("demo", tmp_path / "out", Settings(questions=9, **settings), output=Output(dry_run=True))
        return (tmp_path / "out.work" / "scores.safetensors").read_bytes()

    first = run()
    second = run(objective="log-odds")
    names = {path.name for path in (tmp_path / "out.work").glob("*.safetensors")}
    assert second != first and len(names) == 2 and "was renamed to scores-" in capsys.readouterr().err
    assert run() == first and "attribution" not in capsys.readouterr().err  # nothing was computed again
    assert {path.read_bytes() for path in (tmp_path / "out.work").glob("*.safetensors")} == {first, second}
    with pytest.raises(ScoresError, match="another model, recipe or setting"):
        locate("demo", tmp_path / "out.work" / "scores.safetensors", Settings(questions=9, site="gate"))


def test_killed_locate_resumes_with_the_same_bytes(baked, tmp_path):
    folder, _ = baked
    out = tmp_path / "scores.safetensors"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "locate", "--in", "demo", "--out", str(out)], stderr=subprocess.DEVNULL
    )
    deadline = time.time() + 120
    while not out.exists() and time.time() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was not done yet
    located = run("locate", "--in", "demo", "--out", out, "--json", cwd=tmp_path)
    assert located.returncode == 0 and parsed("locate", located.stdout)["questions"] > 0
    assert out.read_bytes() == (folder / "debiased.work" / "scores.safetensors").read_bytes()


def test_dry_run_writes_no_checkpoint(baked, tmp_path):
    folder, _ = baked
    edit = folder / "debiased.work" / "edit.json"
    result = run("bake", "--in", "demo", "--edit", edit, "--out", "x", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0 and "down_proj" in result.stdout
    assert not list(tmp_path.iterdir())


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """A shell that finds `kbne-edit`, as after an installation; so do all processes of the test."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "kbne-edit"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT / "cli.py"} "$@"\n')
    program.chmod(0o755)
    first = Path(sys.executable).parent  # where the program is installed, if it is
    monkeypatch.setenv("PATH", f"{first}:{tmp_path / 'bin'}:{os.environ['PATH']}")
    return lambda line, cwd: subprocess.run(["sh", "-c", line], cwd=cwd, capture_output=True, text=True)


def _next(result):
    assert result.returncode == 0, result.stderr
    return [line.removeprefix("next:").strip() for line in result.stdout.split("\nnext:", 1)[1].splitlines() if line]


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, commands",
    [("checkpoint", ["evaluate", "verify", "report", "revert"]), ("peft", ["bake"]), ("delta", ["apply"])],
)
def test_what_is_said_to_come_next_works_as_printed(form, commands, edit, shell, tmp_path):
    """Whatever the output is called: quotes, spaces, what the shell would expand, letters of any script."""
    name = """it's "$HOME" `*` \\ über"""
    lines = _next(run("bake", "--in", "demo", "--edit", edit, "--as", form, "--out", name, cwd=tmp_path))
    assert [line.split()[1] for line in lines if line.startswith("kbne-edit")] == commands
    assert len(lines) == len(commands) + (form != "delta")  # and one of Python
    for line in lines:
        result = shell(line, tmp_path)
        assert result.returncode == 0, line + result.stderr
    made = {"checkpoint": [".html", "-reverted"], "peft": ["-merged"], "delta": ["-applied"]}[form]
    assert all((tmp_path / f"{name}{end}").exists() for end in made)


def test_what_comes_next_on_the_way(baked, shell, tmp_path):
    folder, _ = baked
    scores = tmp_path / "its scores.safetensors"
    shutil.copyfile(folder / "debiased.work" / "scores.safetensors", scores)
    (line,) = _next(run("locate", "--in", "demo", "--out", scores, cwd=tmp_path))
    (line,) = _next(shell(line, tmp_path))
    assert line == "kbne-edit bake --in demo --edit edit.json --out ./debiased"
    (line,) = _next(run("recipes", "new", "mine", "--out", "my recipe.yaml", cwd=tmp_path))
    assert shell(line, tmp_path).returncode == 0
    work = tmp_path / "some where"
    shutil.copytree(folder / "debiased.work", work)
    lines = _next(run("bake", "--in", "demo", "--work", work, "--out", "out", "--no-behaviour", cwd=tmp_path))
    (line,) = (line for line in lines if line.startswith("kbne-edit report"))
    assert shell(line, tmp_path).returncode == 0 and "Attribution by layer" in (tmp_path / "out.html").read_text()


def test_a_program_that_the_shell_does_not_find_is_named_by_its_path(monkeypatch, tmp_path):
    for name in ("python", "kbne-edit"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    assert options.shell("kbne-edit", "x y") == f"{tmp_path}/kbne-edit 'x y'"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert options.shell("kbne-edit") == "kbne-edit" and options.shell("python") == "python"
    (tmp_path / "python").rename(tmp_path / "python3.11")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python3.11"))
    assert options.shell("python") == "python3.11"


@pytest.fixture
def base(tmp_path):
    shutil.copytree(DEMO, tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def edit(tmp_path):
    Edit("down", {1: {5: 2.0, 9: 2.0}}).save(tmp_path / "edit.json")
    return tmp_path / "edit.json"


def _config(base, **changes):
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | changes))


def _bad_index(base):
    (base / "model.safetensors").unlink()
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))


def _truncated(base):
    data = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(data[:-100])


def _only(base, name):
    (base / "model.safetensors").unlink()
    (base / name).write_bytes(b"x")


def _pth(base):
    _only(base, "consolidated.00.pth")


def _adapter(base):
    (base / "config.json").rename(base / "adapter_config.json")


def _evil_bin(base):
    import pickle

    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(base.parent / "owned"),))

    _only(base, "pytorch_model.bin")
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


WRONG = {
    "truncated": (_truncated, "truncated"),
    "index": (_bad_index, "is missing"),
    "quantised": (lambda b: _config(b, quantization_config={"quant_method": "gptq"}), "gptq"),
    "encoder-decoder": (lambda b: _config(b, model_type="t5"), "encoder-decoder"),
    "long name": (lambda b: _config(b, model_type="x" * 9000, architectures=["y" * 9000]), "unknown architecture 'xxx"),
    "unknown": (lambda b: _config(b, model_type="newarch"), "unknown architecture 'newarch'"),
    "recurrent": (
        lambda b: _config(b, model_type="mamba2"),
        "mamba2 cannot be edited: its layers have no feed-forward block",
    ),
    "adapter": (_adapter, "adapter"),
    "pth": (_pth, ".pth"),
    "pickle": (_evil_bin, "nothing of it was run"),
    "lfs": (lambda b: (b / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs"),
    "no config": (lambda b: (b / "config.json").unlink(), "config.json"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_checkpoint(case, base, edit, tmp_path):
    spoil, message = WRONG[case]
    spoil(base)
    before = files(base)
    result = run("bake", "--in", base, "--edit", edit, "--out", tmp_path / "out", cwd=tmp_path)
    _refused(result, message, tmp_path)
    assert files(base) == before


def _refused(result, message, tmp_path):
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith(("error:", "Error:"))]) == 1
    assert "Traceback" not in result.stderr and len(result.stderr) < 4000
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*kbne*")) and not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "args, message",
    [
        (["--in", "nothing/here/at-all"], "does not exist"),
        (["--in", "edit.json"], "is a file"),
        (["--in", "empty"], "is empty"),
        (["--in", "org/name"], "cannot be reached"),
        (["--in", "base", "--out", "base"], "--out base is base, which is read and never changed"),
        (["--in", "base", "--out", "base/sub"], "--out base/sub is inside base"),
        (["--in", "base", "--out", "."], "--out . holds "),
        (["--in", "base", "--work", "base/work"], "--work base/work/scores.safetensors is inside "),
        (
            ["--in", "base", "--edit", "full/edit.json", "--out", "full", "--overwrite"],
            "--out full holds full/edit.json",
        ),
        (["--in", "base", "--out", "full"], "exists"),
        (["--in", "base", "--edit", "range.json"], "neuron 100000"),
        (["--in", "base", "--edit", "other.json"], "another model"),
        (["--in", "base", "--edit", "one.json"], "change nothing"),
        (["--in", "base", "--edit", "broken.json"], "not JSON"),
        (["--in", "base", "--edit", "edit.json", "--factor", "1e30"], "usable number"),
        (["--in", "base", "--site", "sideways"], "sideways"),
        (["--in", "demo", "--edit", "edit.json", "--tau", "7"], "tau"),
    ],
)
def test_wrong_arguments(args, message, base, edit, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    shutil.copyfile(edit, tmp_path / "full" / "edit.json")
    Edit("down", {1: {100000: 2.0}}).save(tmp_path / "range.json")
    Edit("down", {1: {1: 2.0}}, base="0" * 64).save(tmp_path / "other.json")
    Edit("down", {1: {1: 1.0}}).save(tmp_path / "one.json")
    (tmp_path / "broken.json").write_text("{")
    for option, default in (("--edit", "edit.json"), ("--out", "out")):
        args = args if option in args else [*args, option, default]
    result = run("bake", *args, cwd=tmp_path)
    status = 3 if message == "cannot be reached" else 2  # the network, and not what was asked
    assert result.returncode == status and message in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["locate", "--in", "base", "--out", "base/scores.safetensors"],
        ["locate", "--in", "base", "--out", "link/scores.safetensors"],
        ["locate", "--in", "bin", "--out", "bin/scores.safetensors"],
        ["bake", "--in", "bin", "--edit", "edit.json", "--out", "bin", "--overwrite"],
        ["select", "scores.safetensors", "--out", "scores.safetensors"],
        ["tune", "scores.safetensors", "--in", "base", "--tasks", "knowledge", "--out", "base/tuned"],
        ["evaluate", "--in", "base", "--out", "base/results.json"],
        ["evaluate", "--in", "base", "--edit", "edit.json", "--out", "edit.json"],
        ["evaluate", "--in", "demo", "--baked", "base", "--out", "base/results.json"],
        ["evaluate", "--in", "demo", "--scores", "scores.safetensors", "--out", "scores.safetensors"],
        ["report", "base", "--out", "base/report.html"],
        ["report", "base", "--scores", "scores.safetensors", "--out", "scores.safetensors"],
        ["revert", "base", "--out", "base", "--overwrite"],
        ["apply", "delta", "--in", "base", "--out", "delta", "--overwrite"],
        ["apply", "delta", "--in", "bin", "--out", "bin", "--overwrite"],
    ],
    ids=lambda args: " ".join([args[0], *args[-3:]]),
)
def test_no_command_writes_over_what_it_reads(args, base, edit, baked, tmp_path):
    """An output that the model's directory held would be taken for a part of the model by the next command."""
    (tmp_path / "link").symlink_to("base")
    shutil.copytree(base, tmp_path / "bin")
    torch.save(load_file(base / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    (tmp_path / "delta").mkdir()
    shutil.copyfile(base / "model.safetensors", tmp_path / "delta" / "kbne_delta.kbne")
    shutil.copyfile(base / "model.safetensors", tmp_path / "scores.safetensors")
    if args[0] == "revert":
        fold(DEMO, Edit.load(edit), base, overwrite=True)
    if args[0] == "tune":
        shutil.copyfile(baked[0] / "debiased.work" / "scores.safetensors", tmp_path / "scores.safetensors")
    before = files(tmp_path)
    result = run(*args, cwd=tmp_path)
    assert result.returncode == 2 and "which is read and never changed" in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2 and files(tmp_path) == before


def test_faults_of_a_recipe_come_all_at_once(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "kbne_recipe: 1\nname: r\nprompt: {plain: 'x'}\nanswers: ['yes', 'no']\nfactr: 2\n"
        "questions: {items: [{text: t, answer: maybe, dimension: d}]}\nselect: {tau: 3}\n"
    )
    result = run("recipes", "check", "r.yaml", cwd=tmp_path)
    assert result.returncode == 2
    for fault in ("factr", "{question}", "'maybe'", "select.tau"):
        assert fault in result.stderr


def test_interrupt(tmp_path):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), "bake", "--in", "demo", "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background inherits "ignored"
    )
    while not (tmp_path / "out.work" / "scores.safetensors").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_full_disk(base, edit, tmp_path):
    """A limit on file size stands for a full disk: the write fails in the middle of a shard."""
    code = f"ulimit -f 300; exec {sys.executable} {ROOT / 'cli.py'} bake --in base --edit edit.json --out out"
    result = subprocess.run(["bash", "-c", "trap '' XFSZ; " + code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2 and "cannot write" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*kbne*"))


def test_bin_weights_come_out_as_safetensors(edit, tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "safe")
    shutil.copytree(tmp_path / "safe", tmp_path / "bin")
    weights = load_file(tmp_path / "safe" / "model.safetensors")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    result = run("bake", "--in", "bin", "--edit", edit, "--out", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == weights.keys()
    assert sum(not torch.equal(got[k], weights[k]) for k in got) == 1


@pytest.mark.parametrize("spoil", ["weight", "other", "manifest", "undo", "extra", "config", "card"])
def test_verify_finds_tampering(spoil, baked, tmp_path):
    folder, _ = baked
    shutil.copytree(folder / "debiased", tmp_path / "copy")
    copy = tmp_path / "copy"
    if spoil == "weight":
        weights = load_file(copy / "model.safetensors")
        weights["model.layers.0.self_attn.q_proj.weight"][3, 4] += 1
        save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    elif spoil == "manifest":
        text = (copy / "kbne_edit.json").read_text()
        (copy / "kbne_edit.json").write_text(text.replace(": 2.0", ": 4.0", 1))
    elif spoil == "config":
        text = (copy / "config.json").read_text()
        (copy / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    elif spoil == "extra":
        (copy / "pytorch_model.bin").write_bytes(b"old weights")
    else:
        name = {"other": "tokenizer.json", "undo": "kbne_undo.kbne", "card": "README.md"}[spoil]
        data = bytearray((copy / name).read_bytes())
        data[-20] ^= 1
        (copy / name).write_bytes(bytes(data))
    result = run("verify", "--in", "demo", "--baked", copy, "--no-behaviour", cwd=tmp_path)
    assert result.returncode == 1 and "FAILS" in result.stdout, result.stdout + result.stderr


def test_verify_a_directory_made_elsewhere(tmp_path):
    """Scaled by hand and saved by transformers in other shards: the edit is recovered from the weights."""
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        weight = model.model.layers[1].mlp.down_proj.weight
        weight[:, 7] = (weight[:, 7].float() * 3.5).to(weight.dtype)
    model.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    result = run("verify", "--in", "base", "--baked", "other", "--json", cwd=tmp_path)
    report = parsed("verify", result.stdout)
    assert result.returncode == 0 and report["edit"] == {"site": "down", "neurons": 1, "factors": [3.5]}, result.stderr
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    assert run("verify", "--in", "base", "--baked", "other", cwd=tmp_path).returncode == 1


def test_the_folder_of_the_work_may_hold_the_model(base, edit, tmp_path):
    result = run("bake", "--in", "base", "--edit", edit, "--work", ".", "--out", "out", "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
