"""report.html in a real browser: no request, no complaint, and everything on it works, at 360 and 1600 pixels."""

import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runs.report.page import write_report
from schemas.compose import CONFIG_ROOT
from tests.helpers.browser import PROGRAM, Page, browser_page
from tests.helpers.report_run import metrics_of, write_run
from tests.test_report import EVIL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PROGRAM is None, reason="no chromium on the PATH (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Reports of one run, of two, and of one that finished no step."""
    folder = tmp_path_factory.mktemp("pages")
    a = write_run(folder / "A", num_steps=40, texts=EVIL * 3)
    b = write_run(folder / "B", num_steps=30, gain=-1.0, overrides=("learning_rate=1e-4",), finished=False, seed=1)
    c = write_run(folder / "C", num_steps=1)
    (c / "metrics.jsonl").unlink()
    return {
        "one": write_report([a], folder / "one.html"),
        "two": write_report([a, b], folder / "two.html"),
        "none": write_report([c], folder / "none.html"),
        "run": a,
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browser_page(tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture
def page(browser):
    """No test may leave a complaint of the page, or a request to a host."""
    browser.problems.clear()
    browser.requests.clear()
    yield browser
    assert browser.problems == []
    assert [address[:80] for address in browser.requests if not address.startswith(("file:", "data:"))] == []


def choose(page: Page, field: str, value: str) -> None:
    """Set a select of the browser of completions."""
    found = page.js(f"""(() => {{
      const labels = [...document.querySelectorAll('.browser .field')];
      const label = labels.find((l) => l.firstChild.textContent === {field!r});
      const list = label.querySelector('select, input');
      list.value = {value!r};
      list.dispatchEvent(new Event(list.tagName === 'INPUT' ? 'input' : 'change'));
      return list.value;
    }})()""")
    assert found == value


def rows(page: Page) -> list[str]:
    return page.js("[...document.querySelectorAll('.list .row')].map((row) => row.textContent)")


def view(page: Page, name: str) -> None:
    page.js(f"document.querySelector('[data-view={name}]').click()")


@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["one", "two", "none"])
def test_it_fits_the_screen_and_every_chart_is_drawn(page, pages, name, width, theme):
    page.open(pages[name], width=width, theme=theme)
    assert page.js("document.documentElement.scrollWidth") <= width
    height = page.js("document.documentElement.scrollHeight")
    for top in range(0, height, 900):
        page.js(f"scrollTo({{top: {top}, behavior: 'instant'}})")
        page.js("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 20)))")
    page.wait_for("[...document.querySelectorAll('.part > .grid .plot')].every((plot) => plot.querySelector('canvas'))")
    num_charts = page.js("document.querySelectorAll('.part > .grid canvas').length")
    assert num_charts > 10 if name != "none" else num_charts == 0
    wide = page.js("[...document.querySelectorAll('canvas')].filter((c) => c.clientWidth > innerWidth).length")
    assert wide == 0 and page.js("document.documentElement.dataset.theme") == theme


def test_the_head_line_and_what_is_missing_are_said(page, pages):
    page.open(pages["two"])
    titles = page.js("[...document.querySelectorAll('.verdict h2')].map((h) => h.textContent)")
    assert titles == ["\u2713Learned", "\u2717Got worse"]
    assert page.js("document.querySelector('.missing').textContent") == "no summary.json: the run has not ended"
    page.open(pages["none"])
    assert "no metrics.jsonl" in page.js("document.querySelector('.missing').textContent")


def test_numbers_under_a_chart_are_those_of_the_metrics_file(page, pages):
    page.open(pages["one"])
    chart = "[...document.querySelectorAll('.chart')].find((c) => c.dataset.panel === 'Gradient norm')"
    page.js(f"{chart}.scrollIntoView({{behavior: 'instant'}}); {chart}.querySelector('details').open = true")
    page.wait_for(f"{chart}.querySelector('td') !== null")
    shown = page.js(f"[...{chart}.querySelectorAll('tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))")
    logged = [(line["step"], line["grad_norm"]) for line in metrics_of(pages["run"]) if "grad_norm" in line]
    assert [int(step) for step, _ in shown] == [step for step, _ in logged]
    for (_, text), (_, value) in zip(shown, logged, strict=True):
        assert float(text.replace("\u2212", "-")) == pytest.approx(value, rel=6e-3)


def test_a_chart_is_read_by_keyboard_and_its_lines_are_hidden_by_their_buttons(page, pages):
    page.open(pages["one"])
    chart = "document.querySelector('.chart')"
    page.js(f"{chart}.scrollIntoView({{behavior: 'instant'}})")
    page.wait_for(f"{chart}.querySelector('canvas') !== null")
    page.js(f"{chart}.querySelector('.plot').focus()")
    page.press("ArrowRight")
    page.press("ArrowRight")
    assert page.js("document.getElementById('said').textContent").startswith("step 1: training \u2212")
    assert page.js(f"{chart}.querySelector('.legend').dataset.step") == "1"
    page.js(f"{chart}.querySelector('.legend button').click()")
    assert page.js(f"{chart}.querySelector('.legend button').getAttribute('aria-pressed')") == "false"
    smooth = "document.querySelector('.controls.loose select')"
    page.js(f"{smooth}.value = '5'; {smooth}.dispatchEvent(new Event('change'))")


def test_completions_are_sorted_and_filtered(page, pages):
    page.open(pages["one"])
    page.wait_for("document.querySelectorAll('.list .row').length > 5")
    assert len(rows(page)) < 40, "rows out of sight are not in the page"
    assert page.js("document.querySelector('.browser [role=status]').textContent").startswith("320 completions")
    chips = "[...document.querySelectorAll('.list .row .chip.value')]"
    values = f"{chips}.map((c) => Number(c.textContent.replace('\u2212', '-')))"
    for order, sign in (("best", -1), ("worst", 1)):
        choose(page, "Sort by", order)
        found = page.js(values)
        assert found == sorted(found, key=lambda value: sign * value)
    choose(page, "Sort by", "down")
    advantages = [
        float(re.search(r"advantage([+\u2212][\d.e\u2212]+)", row)[1].replace("\u2212", "-")) for row in rows(page)
    ]
    assert advantages == sorted(advantages) and advantages[0] < 0
    choose(page, "Step", "7")
    choose(page, "Kind", "honest")
    assert rows(page) and all(row.startswith("step7") and "honest" in row for row in rows(page))
    choose(page, "Text", "no such text")
    assert rows(page) == []
    choose(page, "Text", "QUESTION 7.1")
    assert rows(page) and all("question 7.1" in row for row in rows(page))


def test_the_list_is_walked_by_keyboard_to_its_end(page, pages):
    page.open(pages["one"])
    page.js("document.querySelector('.list').focus()")
    page.press("ArrowDown")
    assert page.js("document.querySelector('.row[aria-selected=true]').getAttribute('aria-posinset')") == "2"
    page.press("End")
    chosen = "document.querySelector('.row[aria-selected=true]')"
    assert page.js(f"{chosen}.getAttribute('aria-posinset')") == "320"
    box = page.js(
        f"{chosen}.getBoundingClientRect().bottom - document.querySelector('.list').getBoundingClientRect().bottom"
    )
    assert box <= 1


def test_a_group_has_all_completions_of_its_prompt(page, pages):
    page.open(pages["one"])
    choose(page, "Step", "9")
    page.js("document.querySelector('.detail .plain').click()")
    assert page.js("document.querySelector('[data-view=groups]').getAttribute('aria-pressed')") == "true"
    assert page.js("document.querySelectorAll('.detail .completion').length") == 4
    chips = page.js("[...document.querySelectorAll('.detail .completion .chips')].map((c) => c.textContent)")
    assert all("reward" in text and "advantage" in text for text in chips)
    assert "question 9." in page.js("document.querySelector('.detail').textContent")


def test_before_and_after_stand_side_by_side(page, pages):
    page.open(pages["one"])
    view(page, "pairs")
    heads = page.js("[...document.querySelectorAll('.detail h4')].map((h) => h.textContent)")
    assert heads == ["Before \u00b7 step 0", "After \u00b7 step 40"]
    tops = page.js("[...document.querySelectorAll('.detail .completion')].map((c) => c.getBoundingClientRect().top)")
    assert tops[0] == tops[1]
    assert page.js("document.querySelector('.browser [role=status]').textContent") == (
        "10 of 10 held-out questions, at steps 0 and 40."
    )


def test_a_token_tells_its_value_on_hover_tap_and_keys(page, pages):
    page.open(pages["one"], height=1400)
    choose(page, "Step", "9")
    page.js(
        "document.documentElement.style.scrollBehavior = 'auto'; document.querySelector('.detail').scrollIntoView()"
    )
    page.js("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    token = "document.querySelectorAll('.detail .text .tok')[7]"
    place = page.js(
        f"(() => {{ const r = {token}.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
    )
    page.hover(*place)
    page.wait_for("!document.getElementById('tip').hidden")
    shown = page.js("document.getElementById('tip').textContent")
    assert re.search(r'"\S+ ?": log p\(teacher\) \u2212 log p\(student\) = [+\u2212]?[\d.]+ nats', shown)
    expected = page.js(f"({token}).score.value")
    assert float(re.search(r"= (\S+) nats", shown)[1].replace("\u2212", "-")) == pytest.approx(expected, abs=0.005)
    page.hover(2, 2)
    page.wait_for("document.getElementById('tip').hidden")
    page.js(f"{token}.click()")
    assert not page.js("document.getElementById('tip').hidden")
    page.js("[...document.querySelectorAll('.detail .text')].at(-1).focus()")
    page.press("ArrowRight")
    assert re.search(
        r"log-prob \u2212?[\d.]+ nats \u00b7 probability", page.js("document.getElementById('said').textContent")
    )


def test_texts_of_models_are_shown_as_texts(page, pages):
    page.open(pages["one"])
    choose(page, "Step", "1")
    seen = set()
    page.js("document.querySelector('.list').focus()")
    for _ in range(8):
        seen.add(page.js("document.querySelector('.detail .completion .text').textContent"))
        page.press("ArrowDown")
    view(page, "pairs")
    page.js("document.querySelector('.list').focus()")
    for _ in range(10):
        seen |= set(page.js("[...document.querySelectorAll('.detail .completion .text')].map((t) => t.textContent)"))
        page.press("ArrowDown")
    assert EVIL[0] in seen and EVIL[1] in seen
    assert "nul \u2400 bell \u2407 line\u2028paragraph\u2029 end" in seen
    assert any(text.startswith("right \u27e8U+202E\u27e9to left") for text in seen)
    assert "x" * 2000 in seen and EVIL[5] in seen
    assert page.js("window.evil === undefined && document.querySelectorAll('img').length === 0")


def test_runs_are_compared(page, pages):
    page.open(pages["two"])
    head = page.js("[...document.querySelectorAll('table.compare th')].map((h) => h.textContent)")
    assert head == ["figure, at the end", "A", "B", "difference"]
    line = page.js("[...document.querySelector('table.compare tbody tr').cells].map((c) => c.textContent)")
    a, b, difference = (float(text.replace("\u2212", "-")) for text in line[1:])
    assert line[0].startswith("held-out solution log-prob") and difference == pytest.approx(b - a, abs=2e-3)
    settings = page.js("[...document.querySelectorAll('#figures .settings td:first-child')].map((c) => c.textContent)")
    assert settings == ["learning_rate", "max_steps"]
    names = page.js("[...document.querySelector('.chart').querySelectorAll('.legend .name')].map((n) => n.textContent)")
    assert names == ["A: training", "A: held-out", "B: training", "B: held-out"]
    choose(page, "Run", "1")
    assert page.js("document.querySelector('.browser [role=status]').textContent").startswith("240 completions")


def test_printing_shows_every_chart_in_light_colours(page, pages):
    page.open(pages["one"], theme="dark")
    assert len(page.call("Page.printToPDF", printBackground=True)["data"]) > 50_000
    assert page.js("document.querySelectorAll('.part > .grid .plot:not(:has(canvas))').length") == 0
    assert page.js("document.documentElement.dataset.theme") == "dark"


def test_five_hundred_steps_of_64_completions(page, tmp_path):
    """Page below 5 MB, made in 10 s and 500 MB, and a list that is drawn within a frame."""
    run_dir = write_run(
        tmp_path / "A", num_steps=500, num_prompts=8, num_generations=8, num_held_out=128, num_words=120
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start_s = time.perf_counter()
    program = (
        "import sys, runs.report.__main__ as m; m.main([sys.argv[1]]); "
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    root = CONFIG_ROOT.parent
    done = subprocess.run([sys.executable, "-c", program, str(run_dir)], cwd=root, capture_output=True, text=True)
    wall_s = time.perf_counter() - start_s
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 0, done.stderr
    size, peak_kb = (run_dir / "report.html").stat().st_size, int(done.stdout.split()[-1])
    print(f"\n{size / 1e6:.2f} MB, {wall_s:.1f} s ({cpu_s:.1f} s of CPU), {peak_kb / 1e3:.0f} MB of memory")
    assert size < 5e6 and min(wall_s, cpu_s) < 10 and peak_kb < 500_000
    page.open(Path(run_dir / "report.html"))
    said = page.js("document.querySelector('.browser [role=status]').textContent")
    assert re.search(r"The page holds [\d,]+ of [\d,]+ completions of \d+ of 500 logged steps", said)
    per_frame_ms = page.js("""(async () => {
      const list = document.querySelector('.list'), times = [];
      for (let i = 0; i < 60; i += 1) {
        list.scrollTop = i * 97;
        const start = performance.now();
        list.dispatchEvent(new Event('scroll'));
        list.getBoundingClientRect();
        times.push(performance.now() - start);
        await new Promise(requestAnimationFrame);
      }
      return times.sort((a, b) => a - b)[30];
    })()""")
    print(f"{per_frame_ms:.1f} ms to draw the list")
    assert per_frame_ms < 16 and page.js("document.querySelectorAll('.list .row').length") < 40
