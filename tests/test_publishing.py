"""Outputs in a world with other users: modes and owners, planted links, mounts, file systems without locks."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kbne_edit import Checks, Edit, Output, bake, fold, revert
from kbne_edit.attribution.scores import ScoresWriter
from kbne_edit.commands import main
from kbne_edit.disk import publishing
from kbne_edit.disk.publishing import check_out, create, staged
from kbne_edit.errors import OutputError
from kbne_edit.files import forbid_overlap, write_text
from kbne_edit.recipe import Question
from tiny import tiny_model

EDIT = Edit("down", {0: {3: 2.0}, 1: {7: 4.0}})
CLI = Path(__file__).resolve().parent.parent / "cli.py"
ROOT = os.geteuid() == 0


@pytest.fixture
def base(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def _mode(path):
    return stat.S_IMODE(os.lstat(path).st_mode)


def _fill(out, overwrite=False, **options):
    with staged(out, overwrite, **options) as part:
        assert _mode(part) == 0o700  # nobody else may look in, or put something there
        (part / "config.json").write_text("{}")


# ------------------------------------------------------------------------------------------------------ modes, owners


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2770, 0o755])
def test_the_mode_of_an_output_stays(mode, tmp_path):
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
        if name == "full":
            (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name).chmod(mode)
        _fill(tmp_path / name, overwrite=True)
        assert _mode(tmp_path / name) == mode


@pytest.mark.skipif(not ROOT, reason="only root may give files away")
def test_the_owner_of_an_output_stays(tmp_path):
    (tmp_path / "out").mkdir()
    os.chown(tmp_path / "out", 1234, 2345)
    _fill(tmp_path / "out", overwrite=True)
    for path in (tmp_path / "out", tmp_path / "out" / "config.json"):
        assert (os.lstat(path).st_uid, os.lstat(path).st_gid) == (1234, 2345)


def test_a_new_output_has_the_mode_that_the_umask_gives(base, tmp_path):
    (base / "model.safetensors").chmod(0o644)
    fold(base, EDIT, tmp_path / "out")
    assert _mode(tmp_path / "out") == 0o755
    assert {_mode(path) for path in (tmp_path / "out").iterdir()} == {0o644}
    os.umask(0o027)
    fold(base, EDIT, tmp_path / "narrow")
    assert _mode(tmp_path / "narrow") == 0o750 and _mode(tmp_path / "narrow" / "model.safetensors") == 0o640


@pytest.mark.parametrize("size", [None, "20KB"])
def test_a_private_base_gets_no_public_copy(size, base, tmp_path):
    base.chmod(0o700)
    (base / "model.safetensors").chmod(0o600)
    (base / "config.json").chmod(0o640)
    bake(
        base, tmp_path / "out", edit=EDIT, checks=Checks(behaviour=False, measure=False), output=Output(shard_size=size)
    )
    assert _mode(tmp_path / "out") == 0o700
    assert {_mode(path) for path in (tmp_path / "out").glob("*.safetensors")} == {0o600}
    assert _mode(tmp_path / "out" / "config.json") == 0o640
    revert(tmp_path / "out", tmp_path / "again")
    assert _mode(tmp_path / "again") == 0o700 and _mode(tmp_path / "again" / "model.safetensors") == 0o600


def test_scores_and_edits_have_the_mode_that_the_umask_gives(tmp_path):
    EDIT.save(tmp_path / "edit.json")
    assert _mode(tmp_path / "edit.json") == 0o644
    (tmp_path / "edit.json").chmod(0o600)
    EDIT.save(tmp_path / "edit.json")
    assert _mode(tmp_path / "edit.json") == 0o600
    settings = {"site": "down", "base": "b", "model": "m", "recipe": "r"}
    ScoresWriter(tmp_path / "s.safetensors", (Question("Is it?", "yes", "d", "f"),), 1, 2, settings).close()
    assert _mode(tmp_path / "s.safetensors") == 0o644


# ------------------------------------------------------------------------------------------------- what others planted


@pytest.mark.skipif(not ROOT, reason="only root can act as another user")
@pytest.mark.parametrize("state", ["partial", "old"])
def test_a_folder_that_another_user_prepared_is_not_used(state, tmp_path):
    tmp_path.chmod(0o1777)
    planted = tmp_path / f".out.kbne-{state}"
    planted.mkdir()
    (planted / "config.json").write_text('{"planted": 1}')
    os.chown(planted, 1234, 1234)
    with pytest.raises(OutputError, match="belongs to another user"):
        _fill(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("state", ["partial", "old"])
def test_a_planted_link_is_not_followed(state, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("kept")
    (tmp_path / f".out.kbne-{state}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError):
        _fill(tmp_path / "out")
    assert (tmp_path / "elsewhere" / "file").read_text() == "kept"


def test_a_file_is_made_anew_and_no_link_is_followed(tmp_path):
    (tmp_path / "victim").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "victim")
    for name in ("link", "victim"):
        with pytest.raises(FileExistsError):
            create(tmp_path / name)
    (tmp_path / ".edit.json.kbne-partial").symlink_to(tmp_path / "victim")
    write_text(tmp_path / "edit.json", "written")
    assert (tmp_path / "edit.json").read_text() == "written" and not (tmp_path / "edit.json").is_symlink()
    assert (tmp_path / "victim").read_text() == "kept"


# ---------------------------------------------------------------------------------------- mounts, the working directory


def test_the_working_directory_is_filled(base, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    bake(base, ".", edit=EDIT, checks=Checks(behaviour=False, measure=False))
    names = {path.name for path in Path.cwd().iterdir()}
    assert {"config.json", "model.safetensors", "kbne_edit.json", "kbne_undo.kbne", "README.md"} <= names
    assert ".kbne-partial" not in names and os.path.samefile(tmp_path / "here", Path.cwd())
    with pytest.raises(OutputError, match="exists"):
        bake(base, ".", edit=EDIT, checks=Checks(behaviour=False, measure=False))
    bake(
        base,
        ".",
        edit=EDIT.with_factor(4.0),
        checks=Checks(behaviour=False, measure=False),
        output=Output(overwrite=True),
    )
    assert "4.0" in Path("kbne_edit.json").read_text()
    revert(".", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()


def test_a_mount_point_is_filled(base, tmp_path):
    (tmp_path / "volume").mkdir()
    EDIT.save(tmp_path / "edit.json")
    bake_it = f"{sys.executable} {CLI} bake --in base --edit edit.json --no-behaviour --no-measure --out volume"
    script = f"mount -t tmpfs -o size=64m tmpfs volume && echo mounted && {bake_it} && ls -a volume"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    if "mounted" not in done.stdout:
        pytest.skip("this process may not mount a file system")
    assert done.returncode == 0, done.stderr
    assert "kbne_undo.kbne" in done.stdout and ".kbne-partial" not in done.stdout


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_locks(handle, operation):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    _fill(tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


def test_two_runs_at_once_are_still_kept_apart(tmp_path):
    with staged(tmp_path / "out"), pytest.raises(OutputError, match="another run is writing"):
        _fill(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------- --overwrite


@pytest.mark.parametrize("name", ["thesis.tex", "data/results.csv", "notes.txt", "photo.png"])
def test_overwrite_deletes_nothing_that_no_checkpoint_has(name, base, tmp_path):
    fold(base, EDIT, tmp_path / "out")
    path = tmp_path / "out" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("years of work")
    with pytest.raises(OutputError, match="move it away"):
        fold(base, EDIT, tmp_path / "out", overwrite=True)
    assert path.read_text() == "years of work"


def test_overwrite_replaces_what_checkpoints_have(base, tmp_path):
    (base / "extra").mkdir()
    (base / "extra" / "figure.png").write_text("of the base")
    fold(base, EDIT, tmp_path / "out")
    (tmp_path / "out" / "pytorch_model.bin").write_text("an older save")
    fold(base, EDIT.with_factor(4.0), tmp_path / "out", overwrite=True)
    assert (
        not (tmp_path / "out" / "pytorch_model.bin").exists() and (tmp_path / "out" / "extra" / "figure.png").is_file()
    )


# --------------------------------------------------------------------------------------------------- names, exit status


def test_names_that_the_locale_cannot_write(base, tmp_path):
    EDIT.save(tmp_path / "edit.json")
    (base / "größe.txt").write_text("x")
    os.rename(base, tmp_path / "modèle")
    with open(os.fsencode(tmp_path / "modèle") + b"/\xff.txt", "wb") as file:
        file.write(b"x")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, CLI, "bake", "--in", "modèle", "--edit", "edit.json", "--out", "été", "--no-measure"]
    done = subprocess.run([*command, "--no-behaviour"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    again = [sys.executable, CLI, "verify", "--in", "modèle", "--baked", "été", "--no-behaviour"]
    done = subprocess.run(again, cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "failure, status, message",
    [
        (RuntimeError("a fault\nof two lines"), 70, "internal: RuntimeError (a fault)"),
        (AssertionError(), 70, "internal: AssertionError"),
        (MemoryError(), 3, "out of memory"),
        (OSError(errno.EIO, "Input/output error", "/dev/x"), 3, "Input/output error /dev/x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_nobody_expected_has_a_status_of_its_own(failure, status, message, monkeypatch, capsys):
    def fails(*_, **__):
        raise failure

    monkeypatch.setattr("kbne_edit.commands.cli.main", fails)
    with pytest.raises(SystemExit) as ended:
        main()
    reply = capsys.readouterr().err
    assert ended.value.code == status and message in reply and "Traceback" not in reply and len(reply.splitlines()) == 1


@pytest.mark.parametrize("number, status", [(errno.ENOSPC, 3), (errno.EIO, 3), (errno.EACCES, 2), (errno.ENOENT, 2)])
def test_a_full_disk_is_not_wrong_input(number, status, tmp_path):
    with pytest.raises(OutputError) as caught, publishing.write_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == status


def test_links_in_a_circle_are_an_output_that_cannot_be_written(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "base").mkdir()
    forbid_overlap(tmp_path / "loop", tmp_path / "base")
    with pytest.raises(OutputError, match="loop"):
        check_out(tmp_path / "loop", False)
