"""The page of a model's recipes: what it says, and how it looks and works in a real browser."""

import json
import re
import shutil
from html.parser import HTMLParser
from urllib.parse import unquote

import pytest
from result_files import RUNS, speed, write_results

from trtbuild.evaluation.page import COLUMNS, get, page
from trtbuild.evaluation.plots import Point, scatter
from trtbuild.evaluation.recipes import collect
from trtbuild.evaluation.table import recipe_table
from trtbuild.files import write_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (390, 1400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's results, and its page among them."""
    folder = tmp_path_factory.mktemp("page") / "results/tiny"
    data = collect(folder, write_results(folder))
    write_json(folder / "recipes.json", data)
    (folder / "recipes.md").write_text(recipe_table(data), encoding="utf-8")
    (folder / "report.html").write_text(page(data), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(folder):
    return json.loads((folder / "recipes.json").read_text())


class Links(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.tags: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        self.ids |= {found["id"]} if "id" in found else set()
        self.links |= {found[name] for name in ("href", "src", "xlink:href") if name in found}


def test_every_link_leads_to_a_file_or_a_place(folder):
    html = (folder / "report.html").read_text()
    found = Links(html)
    files = {link for link in found.links if not link.startswith(("#", "data:"))}
    assert {"static/logs/perplexity.log", "logs/calibration.news.log", "hf/perplexity.json"} < files
    assert not [link for link in files if not (folder / unquote(link)).is_file()]
    assert {link[1:] for link in found.links if link.startswith("#")} <= found.ids
    assert not re.search(r"https?://|@import|url\(", html)  # opens from a mail


def test_what_models_write_is_text(folder):
    found = Links((folder / "report.html").read_text())
    assert found.tags.count("script") == 1


def test_no_recipe_and_no_result(tmp_path):
    empty = page(collect(tmp_path, {}))
    assert "Hugging Face" in empty
    assert '<svg class="plot"' not in empty
    nothing = page(collect(tmp_path, {"fp16": {"weights": "checkpoint"}}))
    assert "run-fp16" in nothing


def test_a_rehearsal_says_so(data):
    assert "no results" not in page(data)
    assert "no results" in page(data | {"rehearsal": True})


# In a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=CHROMIUM)
        yield opened
        opened.close()


@pytest.fixture(params=[(width, scheme) for width in WIDTHS for scheme in ("light", "dark")], ids=str)
def opened(request, browser, folder):
    """The page at a width; nothing may be fetched, and nothing said on the console."""
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab, said = context.new_page(), []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda wanted: said.append(wanted.url) if not wanted.url.startswith(("file:", "data:")) else None)
    tab.goto((folder / "report.html").as_uri())
    yield tab
    assert said == []
    context.close()


def test_values_are_those_of_the_data(opened, data):
    """Each cell has the number of recipes.json at its column's path, and shows it."""
    cells = opened.evaluate(
        """() => [...document.querySelectorAll("#recipes tbody tr")].flatMap((row) => [...row.cells].map((cell, i) =>
            [row.dataset.run, row.closest("table").tHead.rows[1].cells[i].dataset.path, cell.dataset.value,
             cell.firstChild?.textContent.trim() ?? ""]))"""
    )
    runs = {run["run"]: run for run in (data["baseline"], *data["runs"])}
    shown = {}
    for run, path, value, text in cells:
        if path:
            known = get(runs[run], path)
            assert (None if value is None else float(value)) == known
            assert (text == "") == (known is None)
            shown[run, path] = text
    assert {run for run, _ in shown} == {"hf", *RUNS}
    assert len(shown) >= 4 * 14
    assert shown["static", "gate.increase_percent"] == "+0.50"
    assert shown["static", "rouge.rouge1.difference.mean"] == "−0.50"
    assert shown["static", "benchmark.time_per_output_token_s"] == "2"
    assert shown["static", "lm_eval.quiz.value"] == "0.350"
    assert opened.locator("#reason").inner_text() == "Fits 8 GB, +0.5% perplexity, 2 x float16."
    assert opened.locator(".answer strong").inner_text() == "static"
    assert opened.locator("tr.above").get_attribute("data-run") == "broken"
    assert "rejected" in opened.locator("tr.above").inner_text()
    assert opened.locator("header > p").last.inner_text() == "Rejected by their gate: broken +55.0% (limit 5%)."
    for name, size in runs["static"]["engine"]["parts"].items():
        cell = opened.locator(f'#run-static [data-part="{name}"]').text_content()
        assert cell == f"{size / 1e6:.1f} MB"


def test_columns_sort(opened, data):
    def order() -> list[str]:
        return opened.locator("#recipes tbody:last-of-type tr").evaluate_all(
            "rows => rows.map((row) => row.dataset.run)"
        )

    def click(title: str) -> list[str]:
        opened.locator("#recipes th button", has_text=re.compile(f"^{title}$")).click()
        return order()

    assert order() == ["fp16", "static", "broken"]
    assert click("perplexity") == ["fp16", "static", "broken"]
    assert click("perplexity") == ["broken", "static", "fp16"]
    assert click("ms a token") == ["broken", "static", "fp16"]
    assert click("tokens/s") == ["broken", "static", "fp16"]  # the more the better
    assert click("ROUGE-1")[-1] == "broken"  # what is not there comes last, either way
    assert click("ROUGE-1")[-1] == "broken"
    assert click("recipe") == ["broken", "fp16", "static"]
    assert opened.locator("#recipes tbody.baseline tr").count() == 1


def test_nothing_lies_outside_the_page(opened):
    opened.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    width = opened.viewport_size["width"]
    assert opened.evaluate("document.documentElement.scrollWidth") == width
    outside = opened.evaluate(
        """() => [...document.querySelectorAll("svg.plot text")].filter((text) => {
            const plot = text.closest("svg").getBoundingClientRect(), box = text.getBoundingClientRect();
            return box.width && (box.left < plot.left - 1 || box.right > plot.right + 1);
        }).map((text) => text.textContent)"""
    )
    assert outside == []


def test_a_link_to_a_recipe_opens_it(opened):
    assert opened.locator("#run-static").get_attribute("open") is not None  # which is recommended
    assert opened.locator("#run-broken .panel").is_hidden()
    opened.locator('#recipes a[href="#run-broken"]').click()
    opened.locator("#run-broken .panel").wait_for(state="visible")
    titles = opened.locator("#run-broken figure h3").all_inner_texts()
    assert titles == ["Activations rounded to zero", "Error of the weights", "Outliers", "Ranges"]


def test_texts_are_shown_as_they_are(opened, data):
    assert opened.title() == "tiny: recipes"
    shown = opened.locator(".texts").first.locator("p").all_inner_texts()
    assert shown == [data["articles"][0]["reference"], *data["articles"][0]["summaries"].values()]


def test_predictions_stand_beside_what_was_measured(opened, data):
    said = opened.locator("#predicted + .plots svg.plot title").all_text_contents()
    predicted = data["runs"][1]["predicted"]
    weights, peak = (f"{predicted[name] / 1e6:.6g}" for name in ("weight_bytes", "peak_memory_bytes"))
    assert f"static: {weights} and {weights} MB of weights" in said
    assert f"static: {peak} and 500 MB at the peak" in said
    panel = opened.locator("#run-static dd").all_inner_texts()
    assert f"{predicted['weight_bytes'] / 1e6:.4g} MB of weights" in panel


def test_every_text_can_be_read(opened):
    """The contrast of WCAG AA, 4.5, of what has a colour of its own."""
    contrast = opened.evaluate(
        """() => {
          const light = (color) => {
            const [r, g, b] = color.match(/[\\d.]+/g).map((x) => x / 255);
            const line = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
            return 0.2126 * line(r) + 0.7152 * line(g) + 0.0722 * line(b);
          };
          const paper = light(getComputedStyle(document.body).backgroundColor);
          const ratio = (ink) => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
          const found = {};
          for (const one of document.querySelectorAll("body *")) {
            const style = getComputedStyle(one), color = one.tagName === "text" ? style.fill : style.color;
            if (one.checkVisibility()) found[color] = ratio(light(color));
          }
          return found;
        }"""
    )
    assert len(contrast) > 4
    assert min(contrast.values()) >= 4.5, contrast


def test_on_paper_everything_is_open(browser, folder, tmp_path):
    context = browser.new_context()
    tab = context.new_page()
    tab.goto((folder / "report.html").as_uri())
    tab.pdf(path=tmp_path / "report.pdf")
    assert tab.locator("details:not([open])").count() == 0
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    context.close()


def test_the_line_joins_what_is_ahead_in_the_two_numbers_of_a_plot():
    """What is on the front for its memory alone would send it up and down."""
    numbers = {"fast": (1, 2), "light": (2, 3), "good": (3, 0.5), "as good": (4, 0.5), "behind": (5, 5)}
    points = [Point(name, x, y, None, None, "front", name) for name, (x, y) in numbers.items()]
    plot = scatter(points, ["good", "light", "fast", "as good"], "ms", "%")
    line = re.search(r'class="front" d="M([^"]+)"', plot)[1].split("L")
    marks = {
        name: f"{x} {y}" for name, x, y in re.findall(r'<title>([^<]+)</title><circle cx="(.+?)" cy="(.+?)"', plot)
    }
    assert line == [marks["fast"], marks["good"]]


def test_columns_lead_somewhere(data):
    """A path that is misspelt would only leave its column out."""
    fields = {"engine.bytes.tensorrt"}  # not built here
    for column in COLUMNS:
        assert column.path in fields or any(get(run, column.path) is not None for run in data["runs"]), column
    assert get(data["runs"][0], "benchmark.peak_memory_bytes") == speed(*RUNS["fp16"][1:])["peak_memory_bytes"]
