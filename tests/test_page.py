"""Test the report's HTML page: its numbers, and its behaviour in headless Chromium."""

import base64
import hashlib
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from bnrnn.plots.style import COLOURS
from bnrnn.report import chart, leaderboard, paper, report, words
from bnrnn.report.chart import EPOCHS, MOST_POINTS, SECONDS, STEPS, Chart, Curve, Panel
from bnrnn.report.document import Bullets, Folded, Heading, Paragraph, Table, to_html, to_markdown
from bnrnn.report.figures import gamma_chart, validation_chart
from bnrnn.report.groups import sweeps
from bnrnn.runs.find import find, find_runs, read_run
from tests.conftest import ROOT
from tests.run_folders import change, make_run

HOSTILE = '</script><script>alert(1)</script> <img src=x onerror=alert(2)> "a" & $b$'
LSTM = [[3.0 - 0.1 * k + 0.03 * seed for k in range(10)] for seed in range(3)]
BNLSTM = [2.0 - 0.05 * k for k in range(10)]
ODD = Table(
    ["number", "time", "name"],
    "rrl",
    [
        ["1.332 test", "90 s", "run10"],
        ["−0.05", "3 min", "run9"],
        ["1,500 of 100,000", "2.5 h", "run1"],
        ["-", "-", "-"],
        ["failed", "1 min", "Run2"],
        ["+0.010", "59 s", "run02b"],
        ["1.2e+09", "0.5 h", "a"],
        ["100 % accuracy", "1 h", "b"],
    ],
)


def of(found):
    """The curves embedded in a page, by name; of curves with the same name, the last."""
    content = json.loads(chart.embedded(found))
    return {curve["name"]: curve for panel in content["panels"] for curve in panel["curves"]}


# ---------------------------------------------------------------- numbers


def test_the_page_has_the_numbers_of_the_records(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0, 1.5, 1.25])
    make_run(tmp_path / "b", "bnlstm", [1.75, 1.5, 1.125])
    curves = of(validation_chart(find_runs(tmp_path)))
    assert list(curves) == [
        "LSTM", "BN-LSTM, batch statistics", "BN-LSTM, population statistics",
    ]  # fmt: skip
    axes = {"steps": [100, 200, 300], "epochs": [2, 4, 6], "seconds": [1, 2, 3]}
    for name, values in (
        ("LSTM", [2.0, 1.5, 1.25]),
        ("BN-LSTM, batch statistics", [2.0, 1.75, 1.375]),
        ("BN-LSTM, population statistics", [1.75, 1.5, 1.125]),
    ):
        assert curves[name]["y"] == values
        assert curves[name]["x"] == axes


def test_seeds_have_one_switch_and_their_mean_a_mean_time(tmp_path):
    for seed, values in enumerate(LSTM):
        make_run(tmp_path / str(seed), "lstm", values, seed=seed, task="pydocs")
    file = tmp_path / "2" / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(x | {"seconds": 4 * x["seconds"]}) + "\n" for x in lines))
    (panel,) = validation_chart(find_runs(tmp_path)).panels
    assert {curve.name for curve in panel.curves} == {"LSTM, mean of 3 seeds"}
    assert [curve.note for curve in panel.curves] == ["seed 0", "seed 1", "seed 2", ""]
    *seeds, mean = panel.curves
    np.testing.assert_allclose(mean.y, np.mean(LSTM, axis=0))
    assert list(mean.x[SECONDS]) == [2 * k for k in range(1, 11)]  # the mean of k, k and 4k
    assert [curve.x[SECONDS][0] for curve in seeds] == [1, 1, 4]


def test_a_record_without_seconds_has_none_on_that_axis(tmp_path):
    make_run(tmp_path / "a", "lstm", [2.0, 1.5, 1.25], task="pydocs")
    file = tmp_path / "a" / "metrics.jsonl"
    file.write_text(file.read_text().replace(', "seconds": 2}', "}"))
    (curve,) = of(validation_chart(find_runs(tmp_path))).values()
    assert curve["x"] == {"steps": [100, 200, 300], "epochs": [2, 4, 6], "seconds": [1, None, 3]}
    file.write_text(re.sub(r', "seconds": \d', "", file.read_text()))
    (curve,) = of(validation_chart(find_runs(tmp_path))).values()
    assert list(curve["x"]) == ["steps", "epochs"]


def test_the_papers_epochs_are_known_where_our_batches_are_its_own(tmp_path):
    make_run(tmp_path / "a" / "a", "lstm", LSTM[0])
    make_run(tmp_path / "b" / "a", "lstm", LSTM[0], task__batch_size=32)
    theirs = [(s, v) for s, v in paper.validation("ptb")["lstm"] if s <= 1050]
    known = of(validation_chart(find_runs(tmp_path / "a")))["LSTM, the paper"]
    assert list(zip(known["x"]["steps"], known["y"], strict=True)) == theirs
    np.testing.assert_allclose(known["x"]["epochs"], [s / 50 for s, _ in theirs], rtol=1e-6)
    assert "seconds" not in known["x"]
    other = of(validation_chart(find_runs(tmp_path / "b")))["LSTM, the paper"]
    assert list(other["x"]) == ["steps"]


def test_of_long_curves_points_are_left_out_but_no_extreme():
    rng = np.random.default_rng(0)
    values = rng.normal(size=5000)
    values[[1, 77, 4321]] = [9.0, -9.0, math.nan]
    content = of(Chart([Panel("y", [Curve("a", {STEPS: range(5000)}, list(values), "black")])]))
    steps, found = content["a"]["x"]["steps"], content["a"]["y"]
    assert len(found) <= MOST_POINTS
    assert len(found) > 0.9 * MOST_POINTS
    assert content["a"]["of"] == 5000
    assert steps == sorted(set(steps))
    assert {0, 1, 77, 4999} <= set(steps)
    np.testing.assert_allclose(found, values[steps], rtol=1e-6)
    # For every window of 51 points, a point at least as extreme is kept within 51 points of it.
    for start in range(0, 4900, 100):
        inside = [v for s, v in zip(steps, found, strict=True) if start <= s < start + 153]
        stretch = values[start + 51 : start + 102]
        assert min(inside) <= np.nanmin(stretch) + 1e-6
        assert max(inside) >= np.nanmax(stretch) - 1e-6
    assert chart.thinned(range(200), 200) == list(range(200))


def test_fifty_long_runs_stay_small():
    steps = range(0, 200_000, 50)
    curves = [
        Curve(f"LSTM, {k}", {STEPS: steps, EPOCHS: [s / 790 for s in steps],
              SECONDS: [0.3712 * s for s in steps]}, list(1 / (1 + np.sqrt(steps)) + k), "#0072B2")
        for k in range(50)
    ]  # fmt: skip
    assert len(chart.embedded(Chart([Panel("y", curves)]))) < 400_000


def test_hostile_and_impossible_values_are_no_danger_to_the_page():
    curve = Curve(
        HOSTILE + "\u202e\x1b", {STEPS: [1, 2, 3], SECONDS: [math.nan] * 3},
        [math.inf, 1e308, 0.5], "black",
    )  # fmt: skip
    text = chart.embedded(Chart([Panel("<", [curve], limits=(0, 1e308), level=math.nan)]))
    assert "<" not in text
    assert text.isprintable()
    panel = json.loads(text)["panels"][0]
    assert (panel["limits"], panel["level"], panel["y"]) == (None, None, "<")
    assert panel["curves"][0]["y"] == [None, None, 0.5]
    assert list(panel["curves"][0]["x"]) == ["steps"]


def test_folded_blocks():
    blocks = [Folded(Heading(2, "Not run"), [Paragraph("Nothing:"), Bullets(["a", "b"])])]
    assert to_markdown(blocks) == "## Not run\n\nNothing:\n\n- a\n- b\n"
    page = to_html("t", blocks, {})
    assert "<details>\n<summary><h2>Not run</h2></summary>\n<p>Nothing:</p>" in page


def test_only_the_pages_own_script_runs(tmp_path):
    page = to_html("t", [], {})
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert script == (Path(chart.__file__).parent / "page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")


def test_a_sweep_has_the_numbers_of_training_and_validation(outputs):
    (by_gamma,) = sweeps([run for run in find_runs(outputs) if run.data == "pydocs"])
    training, validation = gamma_chart(by_gamma).panels
    assert [list(curve.y) for curve in validation.curves] == [[v + 0.25 for v in BNLSTM[:3]]] * 2
    assert [list(curve.y) for curve in training.curves] == [[], []]


def shipped(name):
    """A shipped run, and its raw validation records with population statistics, by step."""
    folder = ROOT / "results" / "runs" / name
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    valid = {
        line["step"]: line
        for line in lines
        if line["split"] == "valid" and line["statistics"] == "population"
    }
    return read_run(folder), valid


def test_curves_by_epochs_have_steps_and_seconds_too():
    run, valid = shipped("ptb_words-words_small-seed0")
    curves = of(words.chart_of([run], "A title"))
    assert list(curves) == ["Small LSTM, validation", "Small LSTM, training"]
    found = curves["Small LSTM, validation"]
    np.testing.assert_allclose(found["y"], [v["perplexity"] for v in valid.values()], rtol=1e-6)
    assert found["x"]["steps"] == list(valid)
    np.testing.assert_allclose(found["x"]["epochs"], np.array(list(valid)) / 2323, rtol=1e-6)
    np.testing.assert_allclose(
        found["x"]["seconds"], [v["seconds"] for v in valid.values()], rtol=1e-6
    )


def test_the_leaderboard_begins_with_seconds_and_has_the_target():
    runs = [shipped(f"pydocs-{name}-seed0") for name in ("lstm", "bnlstm", "lnlstm")]
    made = leaderboard.chart_of(leaderboard.standings([run for run, _ in runs]), 2.0, "A title")
    assert (made.axis, made.panels[0].level) == (SECONDS, 2.0)
    for run, valid in runs:
        found = of(made)[run.subject.model_title]
        np.testing.assert_allclose(found["y"], [v["bpc"] for v in valid.values()], rtol=1e-6)
        assert found["x"]["steps"] == list(valid)
        seconds = leaderboard.training_seconds(run)
        assert found["x"]["seconds"] == pytest.approx([seconds[step] for step in valid])


# ---------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Three seeds of an LSTM, a BN-LSTM, and a sweep over γ with a hostile model name."""
    folder = tmp_path_factory.mktemp("page") / "outputs"
    for seed, values in enumerate(LSTM):
        make_run(folder / f"lstm{seed}", "lstm", values, seed=seed)
    make_run(folder / "bnlstm", "bnlstm", BNLSTM)
    for gamma in (0.1, 0.5):
        run = folder / f"gamma{gamma}"
        make_run(run, "bnlstm", BNLSTM[:3], task="pydocs", model__gamma_init=gamma)
        change(run / "run.json", model_title=HOSTILE)
    return folder


@pytest.fixture(scope="module")
def file(outputs):
    blocks = report.document(find(outputs), "Report", "All.", lambda run: run.path.name)
    blocks, pictures = report.draw(blocks, ["svg"])
    file = outputs.parent / "report.html"
    vectors = {name: kinds["svg"] for name, kinds in pictures.items()}
    file.write_text(to_html("bnrnn: report", [*blocks, ODD], vectors))
    return file


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="no playwright: make install has it")
    found = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
    with api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        path = own if own.exists() else next(filter(None, found), None)
        if path is None:
            pytest.skip(
                "no Chromium: apt-get install chromium, or .venv/bin/playwright install chromium"
            )
        launched = playwright.chromium.launch(executable_path=path)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def window(browser):
    with browser.new_context(viewport={"width": 1200, "height": 900}) as context:
        yield context


@pytest.fixture
def page(window, file):
    """The report in the browser; any console message or network request fails the test."""
    page = window.new_page()
    seen, asked = [], []
    for event in ("console", "pageerror", "dialog", "requestfailed"):
        page.on(event, lambda what, event=event: seen.append((event, str(what))))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    yield page
    page.close()
    assert seen == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]


def first_chart(page):
    return page.get_by_role("group", name="Validation against training steps, Penn Treebank")


def plot(page):
    return first_chart(page).get_by_role("application")


def drawn(area):
    """Names of the curves drawn in the plots."""
    groups = area.locator(".curve[data-name]").evaluate_all(
        "found => found.filter(one => one.closest('.plot')).map(one => one.dataset.name)"
    )
    return list(dict.fromkeys(groups))


NAMES = [
    "LSTM, the paper", "BN-LSTM, the paper", "LSTM, mean of 3 seeds", "BN-LSTM, batch statistics",
    "BN-LSTM, population statistics",
]  # fmt: skip


def test_what_was_run_comes_first_and_what_was_not_is_folded(page):
    headers = page.locator("table").first.locator("th").all_inner_texts()
    assert [text.strip() for text in headers] == ["data", "runs", "models", "the best"]
    assert page.locator("table").first.locator("td").nth(1).inner_text() == "4"
    summary = page.locator("summary", has_text="Not run")
    line = page.get_by_text("Large LSTM, BN on the input term")
    assert not line.is_visible()
    summary.focus()
    page.keyboard.press("Enter")
    assert line.is_visible()


def test_a_curve_is_switched_off_and_on(page):
    area = first_chart(page)
    assert drawn(area) == NAMES
    button = area.get_by_role("button", name="LSTM, mean of 3 seeds", exact=True)
    assert button.get_attribute("aria-pressed") == "true"
    assert area.locator('.plot [data-name="LSTM, mean of 3 seeds"]').count() == 4
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert drawn(area) == [name for name in NAMES if name != "LSTM, mean of 3 seeds"]
    button.focus()
    page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == "true"
    assert drawn(area) == NAMES
    area.get_by_role("button", name="hide all").click()
    assert drawn(area) == []
    assert "No curve is switched on" in area.locator(".plot").text_content()
    area.get_by_role("button", name="BN-LSTM, batch statistics").click()
    assert drawn(area) == ["BN-LSTM, batch statistics"]
    area.get_by_role("button", name="show all").click()
    assert drawn(area) == NAMES


def ticks(area):
    """The tick values of the x axis, and its label."""
    *numbers, label = area.locator(".plot .x").all_text_contents()
    return [float(number.replace(",", "")) for number in numbers], label


def test_the_axis_is_switched(page):
    area = first_chart(page)
    assert ticks(area) == (list(range(0, 1100, 100)), "training steps")
    area.get_by_role("radio", name="steps").focus()
    page.keyboard.press("ArrowRight")
    numbers, label = ticks(area)
    assert (label, max(numbers)) == ("epochs", 20)  # 50 steps per epoch
    assert "against epochs" in plot(page).get_attribute("aria-label")
    assert drawn(area) == NAMES
    page.keyboard.press("ArrowRight")
    numbers, label = ticks(area)
    assert (label, max(numbers)) == ("seconds, validation included", 10)
    assert drawn(area) == NAMES[2:]
    theirs = area.get_by_role("button", name="LSTM, the paper (no seconds)", exact=True)
    assert theirs.is_disabled()
    area.get_by_role("radio", name="steps").check()
    assert drawn(area) == NAMES


def places(area, name):
    """Screen coordinates of the points of a curve."""
    return area.locator(f'.plot [data-name="{name}"] .line').last.evaluate(
        """line => {
          const inner = line.ownerSVGElement;
          const box = inner.ownerSVGElement.getBoundingClientRect();
          return line.getAttribute("d").split(/[ML]/).slice(1).map((pair) => {
            const [x, y] = pair.split(" ").map(Number);
            return [box.x + inner.x.baseVal.value + x, box.y + inner.y.baseVal.value + y];
          });
        }"""
    )


def test_a_value_is_read_off_with_the_mouse(page):
    area = first_chart(page)
    area.scroll_into_view_if_needed()
    reading = area.get_by_role("status")
    found = places(area, "BN-LSTM, batch statistics")
    assert len(found) == len(BNLSTM)
    for k, (x, y) in enumerate(found):
        page.mouse.move(x + 2, y - 2)
        assert reading.text_content() == (
            f"BN-LSTM, batch statistics: {BNLSTM[k] + 0.25:.3f} at step {100 * (k + 1):,}, "
            f"epoch {2 * (k + 1)}, {k + 1} s"
        )
    x, y = places(area, "LSTM, the paper")[1]
    page.mouse.move(x, y)
    step, value = paper.validation("ptb")["lstm"][1]
    expected = f"LSTM, the paper: {value:.3f} at step {step:g}, epoch {step / 50:.2f}"
    assert reading.text_content() == expected
    # A curve that is switched off cannot be read.
    area.get_by_role("button", name="LSTM, the paper", exact=True).first.click()
    page.mouse.move(x + 1, y)
    assert not reading.text_content().startswith("LSTM, the paper")
    page.mouse.move(0, 0)
    assert reading.text_content() == ""


def test_a_value_is_read_off_with_the_keyboard(page):
    area = first_chart(page)
    for name in NAMES[:2]:
        area.get_by_role("button", name=name, exact=True).click()
    plot(page).focus()
    reading = area.get_by_role("status")
    assert reading.text_content() == ""
    page.keyboard.press("ArrowRight")
    assert reading.text_content() == (
        "LSTM, mean of 3 seeds, seed 0: 3.000 at step 100, epoch 2, 1 s"
    )
    assert reading.get_attribute("aria-live") == "polite"
    page.keyboard.press("ArrowRight")
    assert "2.900 at step 200" in reading.text_content()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    assert "LSTM, mean of 3 seeds: 2.930 at step 200" in reading.text_content()
    page.keyboard.press("End")
    assert "2.130 at step 1,000" in reading.text_content()
    page.keyboard.press("ArrowRight")
    assert "2.130 at step 1,000" in reading.text_content()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Home")
    assert "BN-LSTM, batch statistics: 2.250 at step 100" in reading.text_content()
    page.keyboard.press("Escape")
    assert reading.text_content() == ""


def test_two_panels_have_one_set_of_switches(page):
    area = page.get_by_role("group", name="Training and validation from several initial γ")
    assert area.get_by_role("application").count() == 2
    assert drawn(area) == ["γ = 0.1", "γ = 0.5"]
    area.get_by_role("button", name="γ = 0.5").click()
    assert drawn(area) == ["γ = 0.1"]


def column(table, k):
    return table.locator(f"tbody td:nth-child({k + 1})").all_inner_texts()


def test_a_table_sorts(page):
    table = page.locator("table").last
    headers = table.get_by_role("columnheader")
    before = [column(table, k) for k in range(3)]
    assert before[0][0] == "1.332 test"
    number = table.get_by_role("button", name="number")
    number.click()
    assert headers.nth(0).get_attribute("aria-sort") == "ascending"
    upwards = [
        "−0.05", "+0.010", "1.332 test", "100 % accuracy", "1,500 of 100,000", "1.2e+09",
        "failed", "-",
    ]  # fmt: skip
    assert column(table, 0) == upwards
    number.focus()
    page.keyboard.press("Enter")
    assert headers.nth(0).get_attribute("aria-sort") == "descending"
    assert column(table, 0) == [*upwards[5::-1], "failed", "-"]
    table.get_by_role("button", name="time").click()
    assert headers.nth(0).get_attribute("aria-sort") is None
    assert headers.nth(1).get_attribute("aria-sort") == "ascending"
    assert column(table, 1) == [
        "59 s", "1 min", "90 s", "3 min", "0.5 h", "1 h", "2.5 h", "-",
    ]  # fmt: skip
    table.get_by_role("button", name="name").press("Enter")
    assert column(table, 2) == ["a", "b", "run1", "Run2", "run02b", "run9", "run10", "-"]
    for _ in range(2):
        table.get_by_role("button", name="name").press("Enter")
    assert [column(table, k) for k in range(3)] == before
    assert headers.nth(2).get_attribute("aria-sort") is None


def test_what_a_reader_can_act_on_has_a_name(page):
    for role, css in (
        ("button", "button"), ("radio", "input"), ("application", ".plot"), ("img", "img"),
    ):  # fmt: skip
        visible = page.locator(f"{css}:visible").count()
        assert page.get_by_role(role, name=re.compile(r"\S")).count() == visible, role
    assert page.locator(".plot").count() == 4
    assert page.get_by_role("group", name="x axis").count() == 3
    label = plot(page).get_attribute("aria-label")
    assert label == (
        "Penn Treebank, characters: validation bits per character against training steps, 8 curves"
    )
    described = plot(page).get_attribute("aria-describedby")
    assert "arrow keys" in page.locator(f"#{described}").inner_text()
    ids = page.locator("[id]").evaluate_all("found => found.map(one => one.id)")
    assert len(set(ids)) == len(ids)


def luminance(colour):
    """Relative luminance of `rgb(r, g, b)` or `color(srgb r g b)`, as WCAG defines it."""
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    if not colour.startswith("color"):
        parts = [part / 255 for part in parts]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(a, b):
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_dark_mode(page):
    page.emulate_media(color_scheme="dark")
    style = "([css, name]) => getComputedStyle(document.querySelector(css))[name]"
    ground = page.evaluate(style, ["body", "backgroundColor"])
    assert luminance(ground) < 0.02
    for css in ("body", "figcaption", ".switch", ".hint", "th", ".reading"):
        assert contrast(page.evaluate(style, [css, "color"]), ground) > 4.5, css
    assert contrast(page.evaluate(style, [".plot .x", "fill"]), ground) > 4.5
    for colour in {*COLOURS.values(), "var(--ink)"}:
        stroke = page.evaluate(
            """colour => {
              const curve = document.querySelector(".plot .curve:not([opacity])");
              curve.style.setProperty("--colour", colour);
              return getComputedStyle(curve.querySelector(".line")).stroke;
            }""",
            colour,
        )
        assert contrast(stroke, ground) > 3, colour


def test_a_narrow_screen(page):
    before = plot(page).get_attribute("viewBox")
    page.set_viewport_size({"width": 420, "height": 900})
    for _ in range(50):  # until the chart is redrawn
        if plot(page).get_attribute("viewBox") != before:
            break
        page.wait_for_timeout(100)
    assert page.evaluate("document.documentElement.scrollWidth") == 420
    width = plot(page).bounding_box()["width"]
    assert width < 420
    assert float(plot(page).get_attribute("viewBox").split()[2]) == pytest.approx(width, abs=1)


def test_hostile_names_are_text(page):
    buttons = page.locator(".switch").all_inner_texts()
    assert page.locator("script:not([type])").count() == 1
    assert page.locator("td", has_text=HOSTILE).count() > 0
    assert [text for text in buttons if text.startswith(HOSTILE)] != []


def test_without_javascript_the_picture_is_there(browser, file):
    page = browser.new_page(java_script_enabled=False)
    page.goto(file.as_uri())
    pictures = page.locator("figure img")
    assert pictures.count() == 3
    for k in range(3):
        assert pictures.nth(k).is_visible()
        assert pictures.nth(k).bounding_box()["height"] > 200
    assert page.locator("button, .chart").count() == 0
    page.locator("summary", has_text="Not run").click()
    assert page.get_by_text("Large LSTM, BN on the input term").is_visible()
    page.close()
