"""The page of a report: what its markup promises everyone, that it escapes everything, and how a browser takes it."""

import re
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from kbne_edit import Edit
from kbne_edit.evaluation.cost import Continuation
from kbne_edit.evaluation.measures import FigureChange, QuickMeasure
from kbne_edit.reporting import contents
from kbne_edit.reporting.page import render
from kbne_edit.reporting.types import SplitRow, Sweep, SweepPoint, TaskTest, Token, Tokens
from kbne_edit.statistics import Interval

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = "</table><script>alert(1)</script><img src=x onerror=alert(2)>'\"&amp;\u202e\x1b[31m"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def report(debiased):
    return contents.report(debiased)


class Page(HTMLParser):
    """elements: (tag, attributes) in order; text: of all elements but style. Raises if a tag is not closed in order."""

    VOID = {"meta", "rect", "line", "circle", "polyline"}

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self.open = [], "", []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data

    def all(self, *tags):
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def page(report):
    return Page(render(report))


# ------------------------------------------------------------------------------------------------------------ markup


def test_landmarks_and_headings(page):
    assert all(len(page.all(tag)) == 1 for tag in ("header", "nav", "main", "footer", "h1"))
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a["href"] for a in page.all("a")}
    assert links <= {f"#{name}" for name in ids} and "#main" in links
    assert {f"#{a['id']}" for a in page.all("section")} <= links
    named = " ".join(a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a).split()
    assert set(named) <= set(ids)


def test_tables_and_plots(page):
    assert page.all("th") and all(th["scope"] in ("row", "col") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("svg") == 4 == tags.count("desc")
    for start in (i for i, tag in enumerate(tags) if tag == "svg"):
        assert tags[start + 1 : start + 3] == ["title", "desc"]
        behind = [tag for tag in tags[start + 1 :] if tag in ("svg", "h2", "h3", "details", "summary", "table")]
        assert behind[:3] == ["details", "summary", "table"]


def test_plots_show_the_figures(report):
    """Marks read back from the drawings: places on the map, shades, heights and ends of bars."""
    html = render(report)
    effect, neuron_map, heat, overlap = (Page(svg) for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL))

    def marks(drawing, tag, kind, *keys):
        result = [a for a in drawing.all(tag) if a.get("class") == kind]
        return [tuple(float(a[key]) for key in keys) if len(keys) > 1 else float(a[keys[0]]) for a in result]

    discs, squares = marks(neuron_map, "circle", "first", "cx", "cy"), marks(neuron_map, "rect", "second", "x", "y")
    drawn = np.array([*discs, *((x + 3.5, y + 3.5) for x, y in squares)])  # squares are 7 units wide
    own = [[(n.neuron, n.layer) for n in report.neurons if n.selected_by_controls == s] for s in (0, 1)]
    assert [len(discs), len(squares)] == list(map(len, own)) and discs and squares
    for axis in (0, 1):
        places = [place[axis] for place in own[0] + own[1]]
        line = np.polyfit(places, drawn[:, axis], 1)
        assert line[0] > 0 and np.polyval(line, places) == pytest.approx(drawn[:, axis], abs=0.02)
    shares = np.ravel([row.layers for row in report.map.mass])
    shades = [float(a.get("fill-opacity", 1)) for a in heat.all("rect") if a.get("class") == "heat"]
    assert shades == pytest.approx(shares / shares.max(), abs=0.001)
    counts = [part.neurons for part in report.overlap.parts]
    heights = np.array(marks(overlap, "rect", "first", "height"))
    assert heights / heights[0] == pytest.approx(np.array(counts) / counts[0], abs=0.001)
    assert len(marks(overlap, "circle", "on", "cx")) == sum(len(part.sets) for part in report.overlap.parts)
    keys = ("change_abs", "random_change_abs", "versus_random", "versus_flattened", "change_signed")
    dots = [(a["class"], float(a["cx"])) for a in effect.all("circle")]
    assert [kind for kind, _ in dots] == ["first", *["second"] * 4]  # the edit, and what it is compared with
    means = np.array([x for _, x in dots]) - 240  # the middle is zero
    expected = np.array([report.effect.to_dict()[key][0] for key in keys])
    assert means / means[0] == pytest.approx(expected / expected[0], abs=0.01)


_POINT = SweepPoint("site down, factor 2", 3, Interval(-0.1, -0.2, 0.0), 0.01, -2.0, True, True, True)
SWEEP = Sweep(
    figure="absolute margin",
    margin=5.0,
    max_kl=0.1,
    chosen_by="a rule",
    steered_by=("probes",),
    bounded_by=("arc_easy",),
    split=(SplitRow("probes", 3, "1" * 64, 4, "2" * 64),),
    points=(_POINT, replace(_POINT, kl=0.5, within=False, front=False, chosen=False)),
    test=(TaskTest("probes", Interval(-0.1, -0.2, 0.0), 0.04, "less bias, beyond every control", True),),
    confirmed=True,
    verdict="probes: less bias",
    uses=2,
    sha256="0" * 64,
)


@pytest.mark.parametrize("sweep", [SWEEP, replace(SWEEP, test=None, confirmed=None, verdict=None, uses=None)])
def test_a_sweep_has_its_plot_and_tables(report, page, sweep):
    """And everything in it is escaped, beside an effect and without one."""
    swept = Page(render(replace(report, tuning=sweep)))
    tags = [tag for tag, _ in swept.elements]
    assert tags.count("svg") == 5 and tags.count("table") == len(page.all("table")) + (3 if sweep.test else 2)
    assert len(swept.all("caption")) == tags.count("table")
    assert "KL is below 0.1" in swept.text and ("(test) was not scored" in swept.text) == (sweep.test is None)
    assert ("use 2 of this half" in swept.text) == (sweep.test is not None)
    for without in ({}, {"effect": None}):
        result = replace(report, tuning=sweep, **without)
        spoiled = Page(render(_spoiled(result)))
        assert [tag for tag, _ in spoiled.elements] == [tag for tag, _ in Page(render(result)).elements]
        assert "\x1b" not in spoiled.text and "\u202e" not in spoiled.text


@pytest.mark.parametrize(
    "beyond, confirmed, state", [(True, True, "holds"), (False, True, "warning"), (True, False, "warning")]
)
def test_a_sweep_speaks_of_an_effect_only_beyond_every_control(beyond, confirmed, state, report):
    """Of two tasks: one that goes beyond every control does not speak for the other."""
    rows = (SWEEP.test[0], replace(SWEEP.test[0], beyond=beyond))
    result = replace(report, effect=None, tuning=replace(SWEEP, test=rows, confirmed=confirmed))
    assert {line.about: line.state for line in result.verdicts}["effect on bias"] == state


def test_it_asks_for_nothing(page, report):
    loading = {"script", "img", "link", "iframe", "object", "embed", "video", "audio", "use", "image", "base", "form"}
    assert not loading & {tag for tag, _ in page.elements}
    assert not any({"src", "srcset", "style", "xlink:href"} & set(a) for _, a in page.elements)
    assert "url(" not in render(report) and "@import" not in render(report)
    assert any("default-src 'none'" in a.get("content", "") for a in page.all("meta"))


_CHOSEN = {"state", "site", "form", "aim", "name", "combine", "edit_from", "origin"}  # words that the tool chooses


def _spoiled(value, key=None):
    """The same report with each text in it replaced, but for words that the tool itself chooses."""
    if isinstance(value, Edit):
        return value
    if is_dataclass(value):
        return replace(value, **{f.name: _spoiled(getattr(value, f.name), f.name) for f in fields(value) if f.init})
    if hasattr(value, "_fields"):
        return type(value)(*(_spoiled(getattr(value, name), name) for name in value._fields))
    if isinstance(value, dict):
        free = key in ("dimensions", "by_answer", "by_form")
        return {HOSTILE + str(i) if free else k: _spoiled(v, k) for i, (k, v) in enumerate(value.items())}
    if isinstance(value, (list, tuple)):
        return type(value)(_spoiled(v, key) for v in value)
    return HOSTILE + value if isinstance(value, str) and key not in _CHOSEN else value


def test_everything_from_files_is_escaped(page, report):
    spoiled = Page(render(_spoiled(report)))
    assert [tag for tag, _ in spoiled.elements] == [tag for tag, _ in page.elements]
    assert all(set(a) == set(b) for (_, a), (_, b) in zip(spoiled.elements, page.elements, strict=True))
    assert spoiled.text.count("<script>alert(1)</script>") > 100
    assert "\x1b" not in spoiled.text and "\u202e" not in spoiled.text


def test_the_same_report_gives_the_same_bytes(report, debiased):
    assert render(report) == render(contents.report(debiased))


def test_spaces_at_the_edge_of_tokens_are_shown(report):
    assert all(f"<code>{shown}</code>" in _with_tokens(report, " a", "a b ", "  ") for shown in ("␣a", "a b␣", "␣␣"))
    assert "token 1 (" in _with_tokens(report, None)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("词", "<code>词</code> U+8BCD ("),
        ("\u0e17a", "U+0E17 ("),
        ("\ue000", "<code>·</code> U+E000 ("),
        ("\u0301", "<code>·</code> U+0301 ("),
        ("词词词词词", "U+8BCD U+8BCD U+8BCD U+8BCD …"),
        ("é…“ж", "<code>é…“ж</code> ("),
    ],
)
def test_characters_that_a_system_may_not_draw_have_their_code_points(text, shown, report):
    assert shown in _with_tokens(report, text)


def _with_tokens(report, *texts):
    tokens = Tokens(tuple(Token(1, text, 1.0) for text in texts))
    return render(replace(report, neurons=(replace(report.neurons[0], tokens=tokens),)))


def test_the_verdict_stands_first(page, report):
    """Before the list of sections: what to do, and which parts did not pass."""
    tags = [tag for tag, _ in page.elements]
    place = next(i for i, (_, a) in enumerate(page.elements) if a.get("class", "").startswith("ship "))
    assert place < tags.index("nav") < tags.index("table")
    assert page.text.index("Do not ship.") < page.text.index("Neurons of a language model")
    assert f"Not passed: {', '.join(report.verdict.open)}." in page.text


def test_continuations_stand_side_by_side(report):
    item = Continuation("probe", "The nurse said that", "he was late", "she was late")
    html = render(replace(report, cost=replace(report.cost, continuations=(item, item._replace(after=item.before)))))
    row = re.search(r"<tr><th scope=\"row\"><code>The nurse said that</code>.*?</tr>", html, re.DOTALL)[0]
    assert re.findall(r"<code>(.*?)</code>", row)[1:] == ["he was late", "she was late"] and ">differs<" in row
    assert "1 of 2 change" in html


def test_decisions_and_associations_have_tables(report):
    flips = FigureChange("flips", "percent", 12.5, 10.0, Interval(-2.5, -4.0, -1.0))
    margin = FigureChange("margin", "nats", 0.0643, 0.0511, Interval(-0.0132, -0.02, -0.005))
    measures = (QuickMeasure("decisions", "de", 12, (flips,)), QuickMeasure("<b>x", "en", 60, (margin,)))
    html = render(replace(report, measures=measures))
    rows = [re.findall(r">([-+\d.]+)<", row) for row in re.findall(r"<tr>.*?(?:percent|nats)</th>.*?</tr>", html)]
    assert ["12.5", "10.0", "-2.5", "-4.0", "-1.0"] in rows
    assert ["0.0643", "0.0511", "-0.0132", "-0.0200", "-0.0050"] in rows
    assert "Counterfactual decisions: scenarios (12, language de)" in html and "&lt;b&gt;x (60" in html
    assert "Counterfactual decisions" not in render(report)


def test_what_was_not_measured_never_reads_like_no_effect(report):
    page = Page(render(replace(report, effect=None, cost=None)))
    assert page.text.count("Not measured:") == 2 and "none that the edit has no effect" in page.text


def test_the_table_for_frameworks_says_that_an_edit_without_effect_is_no_mitigation(page):
    assert page.text.index("no mitigation of bias") > page.text.index("SHA-256 of the recipe")
    assert page.text.index("no mitigation of bias") < page.text.index("annex IV", page.text.index("no mitigation"))


def test_colours_have_enough_contrast():
    """WCAG 2: 4.5 to 1 for text, 3 to 1 for marks, in each theme and on paper."""
    style = (ROOT / "kbne_edit" / "reporting" / "report.css").read_text()
    themes = [dict(re.findall(r"--(\w+): (#\w+)", block)) for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)]
    assert len(themes) == 3
    for theme in themes:
        for ground in ("paper", "soft"):
            for name in ("ink", "quiet", "link", "holds", "warning", "failed", "open"):
                assert _contrast(theme[name], theme[ground]) >= 4.5, (name, ground)
        assert all(_contrast(theme[name], theme["paper"]) >= 3 for name in ("first", "second"))


def _contrast(a, b):
    def light(colour):
        digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
        parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


# ---------------------------------------------------------------------------------------- checks without this tool


def test_the_commands_of_the_page_check_the_directory(page, debiased, tmp_path):
    shutil.copytree(debiased, tmp_path / "copy")
    sums = re.search(r"sha256sum -c <<'END'.*?\nEND", page.text, re.DOTALL)[0]
    seal = re.search(r'python3 -c ".*?"', page.text)[0]
    assert _shell(sums, tmp_path / "copy") == (0, len(list(debiased.iterdir())))
    assert _output(seal, tmp_path / "copy") == "True\n"
    for name in ("config.json", "kbne_edit.json"):
        path = tmp_path / "copy" / name
        path.write_text(path.read_text().replace("2", "3", 1))
    assert _shell(sums, tmp_path / "copy")[0] == 1 and _output(seal, tmp_path / "copy") == "False\n"


def _shell(command, folder):
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout.count(": OK")


def _output(command, folder):
    return subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True).stdout


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(report), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """The source of axe-core, a checker of accessibility, by npm."""
    folder = tmp_path_factory.mktemp("axe")
    if shutil.which("npm") is None:
        pytest.skip("needs npm")
    command = ["npm", "install", "--prefix", folder, "--no-save", "--prefer-offline", "--no-audit", "axe-core@4"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=60)
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not answer")
    if done.returncode:
        pytest.skip("npm cannot bring axe-core")
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@contextmanager
def shown(browser, address, width=390, scheme="light"):
    """The page as shown: (page of the browser, what it logged, what it asked for)."""
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme) as context:
        view, logged, requests = context.new_page(), [], []
        view.on("console", lambda message: logged.append(message.text))
        view.on("pageerror", lambda error: logged.append(str(error)))
        view.on("request", lambda request: requests.append(request.url))
        view.goto(address)
        yield view, logged, requests


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_shown_without_error_request_or_sideways_scrolling(width, scheme, browser, address):
    with shown(browser, address, width, scheme) as (view, logged, requests):
        assert view.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        ground = view.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(255, 255, 255)") == (scheme == "light")
        assert logged == [] and requests == [address]


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(width, scheme, browser, address, axe):
    with shown(browser, address, width, scheme) as (view, _, _):
        view.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        view.evaluate(axe)
        result = view.evaluate("axe.run()")
        assert [(v["id"], v["nodes"][0]["html"]) for v in result["violations"]] == [] and len(result["passes"]) > 20


def test_the_checker_finds_what_is_wrong(browser, address, axe):
    with shown(browser, address) as (view, _, _):
        view.evaluate("document.querySelector('svg').removeAttribute('aria-labelledby')")
        view.evaluate("document.querySelectorAll('svg title').forEach(title => title.remove())")
        view.evaluate("document.querySelector('.lead').style.color = 'silver'")
        view.evaluate(axe)
        assert {"color-contrast", "svg-img-alt"} <= {v["id"] for v in view.evaluate("axe.run()")["violations"]}


def test_keyboard(browser, address):
    with shown(browser, address) as (view, _, _):
        view.keyboard.press("Tab")
        look = "getComputedStyle(e).outlineStyle, e.getBoundingClientRect().left >= 0"
        assert view.evaluate(f"(e => [e.className, {look}])(document.activeElement)") == ["skip", "solid", True]
        view.keyboard.press("Enter")
        assert view.evaluate("document.activeElement.id") == "main"
        view.keyboard.press("Tab")
        assert view.evaluate("document.querySelector('main').contains(document.activeElement)")
        view.evaluate("document.querySelector('summary').focus()")
        view.keyboard.press("Enter")
        assert view.evaluate("document.querySelector('details').open")


def test_on_paper(browser, address):
    with shown(browser, address, scheme="dark") as (view, _, _):
        folded = "document.querySelector('details table').checkVisibility()"
        assert not view.evaluate(folded)
        view.emulate_media(media="print")
        assert view.evaluate(folded)  # what is folded on the screen is printed
        assert not view.evaluate("document.querySelector('nav').checkVisibility()")
        assert view.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
