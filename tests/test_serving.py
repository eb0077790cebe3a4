"""Base and edit in a browser. Needs Gradio; the page itself is looked at where a browser is installed, too."""

import shutil
import socket
import sys

import pytest

from kbne_edit import ask
from kbne_edit.errors import InputError
from kbne_edit.serving import LOCAL, launch, served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROMPT = "is the clan of the hill"


def test_without_gradio_the_error_says_what_to_install(debiased, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"pip install 'kbne-edit\[serve\]'"), served(debiased):
        pass


@pytest.fixture(scope="module")
def address(debiased):
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind((LOCAL, 0))
        port = free.getsockname()[1]
    with served(debiased, "demo") as page:
        with socket.socket() as taken, pytest.raises(InputError, match="choose another --port"):
            taken.bind((LOCAL, port))
            taken.listen()
            launch(page, port=port, wait=False)
        yield launch(page, port=port, wait=False)
        page.close()


def test_a_person_asks_and_reads_the_report(address, debiased):
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    expected = ask(str(debiased), [PROMPT], against="demo")[0]
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        view, requests = browser.new_page(), []
        view.on("request", lambda request: requests.append(request.url))
        view.goto(address)
        view.get_by_label("Prompt").fill(PROMPT)
        view.get_by_role("button", name="Ask").click()
        for name, reply in (("base", expected.base), ("edited", expected.edited)):
            sync.expect(view.get_by_label(name, exact=True)).to_have_value(reply, timeout=60_000)
        assert "Verdict: do not ship" in view.inner_text("body")
        view.get_by_role("tab", name="Report").click()
        frame = view.frame_locator("iframe[title=Report]")
        sync.expect(frame.get_by_role("heading", name="Verdict", exact=True)).to_be_visible(timeout=60_000)
        browser.close()
    assert requests and all(url.startswith((address, "data:", "blob:", "about:")) for url in requests)


def test_only_this_machine_is_served(address):
    """Other addresses of this machine do not answer."""
    port = int(address.rpartition(":")[2])
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.2", port)) != 0
    with socket.socket() as own:
        assert own.connect_ex((LOCAL, port)) == 0
