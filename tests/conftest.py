import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for the network
# Forked children (tests/faults.py) would wait for ever on OpenMP's threads, which a fork does not take along.
os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared():
    """The folder of public material beside the checkout; tests that need it skip where it is absent."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs ../shared")
    return path


@pytest.fixture(scope="session")
def debiased(tmp_path_factory):
    """The demo, baked with nine questions; its work folder beside it. Not to be changed."""
    from kbne_edit import bake
    from kbne_edit.locating import Settings

    folder = tmp_path_factory.mktemp("session") / "debiased"
    bake("demo", folder, Settings(questions=9))
    return folder


@pytest.fixture(scope="session")
def chatty(tmp_path_factory):
    """A tiny chat model with variety (tests/chat.py): its directory. Not to be changed."""
    from chat import save_chat

    return save_chat(tmp_path_factory.mktemp("session") / "chatty")


@pytest.fixture
def shown():
    """Lines of progress go to stderr, as on the command line."""
    from kbne_edit.progress import show_progress

    show_progress()
    yield
    show_progress(False)
