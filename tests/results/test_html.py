"report.html: whatever stands in a file stays text, nothing is loaded, and the page does what it says, in a browser too."

import base64
import copy
import json
import shutil
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dora_nb.command.main import main
from dora_nb.data.tasks import TASKS, Task
from dora_nb.results.answer import differences
from dora_nb.results.html import render_html
from dora_nb.results.labels import parameters
from dora_nb.results.page import render
from dora_nb.results.questions import item_groups, item_texts, pack_items
from dora_nb.results.stored import NO_RESULTS, Results, read_report, store_results
from dora_nb.training.evaluate import wilson

QUICK = Path(__file__).parents[2] / "reports" / "quick"
EVIL = (
    "a|b <script>alert(1)</script> </script><img src=x onerror=alert(2)> & \"q\" 'r' `c` *d* _e_ $x$ &lt; &#60; \\| "
    "[f](javascript:alert(3)) ![g](http://evil.example/x.png) <!-- ]]> \u202eback\u202c"
)
SHOWN = " ".join("".join(c if c.isprintable() else " " for c in EVIL).split())  # in names: without bidi characters
ITEMS = 30
TEXTS = [f"{EVIL}\nquestion {i}?" for i in range(ITEMS)]


def rows(split):
    return [{"question": TEXTS[i], "choices": [f"yes {EVIL}", "no </td>"], "label": i % 2} for i in range(ITEMS)]


@pytest.fixture
def evil(tmp_path, monkeypatch):
    "A report in which every name, text and word comes from somebody else."
    ask = lambda row: ([row["question"]] * 2, [f" {c}" for c in row["choices"]])
    counts = {"train": ITEMS, "validation": ITEMS}
    task = Task(f"task {EVIL}", f"# {EVIL}", counts, ("question", "choices"), ("a", "b"), ask, str, rows=rows)
    monkeypatch.setattr(TASKS, "_entries", TASKS._entries | {task.name: task})
    model, results, answers = read_report(QUICK).results[1], [], []
    for method in ("lora", "dora"):
        for seed in (0, 1):
            r = copy.deepcopy(model) | {"run": f"{method} {seed} {EVIL}"}
            r["params"] |= dict(method=method, seed=seed, task=task.name, model=EVIL, objective=EVIL, eval_items=None)
            r["machine"]["cpu"], r["versions"][EVIL], r["checksums"] = EVIL, EVIL, {}
            wrong = 10 * (method == "dora") + seed  # the first ones
            pred = [1 - i % 2 if i < wrong else i % 2 for i in range(ITEMS)]
            r["metrics"] = {"acc": 1 - wrong / ITEMS, "n": ITEMS, "seconds": 1.0}
            results.append(r)
            gold = [i % 2 for i in range(ITEMS)]
            answers.append(pd.DataFrame(dict(run=r["run"], doc_index=range(ITEMS), gold=gold, pred=pred)))
    history = pd.DataFrame(
        [dict(run=r["run"], step=s, loss=1.0, learning_rate=0.1) for r in results for s in (1, 2, 3)]
    )
    probes = {results[0]["run"]: [{"step": 1, "error": EVIL}]}
    out = tmp_path / "report <b>`x`"
    out.mkdir()
    problems = [f"- [ ] {EVIL}: {EVIL}"]
    store_results(out, Results(results, problems, pd.concat(answers), history, NO_RESULTS.geometry, probes))
    words = json.dumps(f"{EVIL}\n```\nnever closed", ensure_ascii=False)
    short = json.dumps(EVIL, ensure_ascii=False)
    grid = f'name = "x"\n[axes]\nseed = [0, 1]\n[report]\ntitle = {words}\nclaim = {words}\nanswer = {short}\nverdict = {words}\ndoubts = [{words}]\n'
    (out / "grid.toml").write_text(grid, encoding="utf-8")
    return out


class Reader(HTMLParser):
    "Collects the elements of a page and the text outside scripts and styles."

    def __init__(self, html):
        super().__init__()
        self.elements, self.text, self._code = [], "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._code = tag in ("script", "style")

    def handle_endtag(self, tag):
        self._code = False

    def handle_data(self, data):
        self.text += "" if self._code else data


ELEMENTS = set("html head meta title style body main h1 h2 p div section nav form label select noscript script".split())
ELEMENTS |= set("figure img figcaption table thead tbody tr th td footer span a strong em code pre ul li hr".split())


@pytest.mark.attack("hostile input")
def test_text_from_files_stays_text(evil):
    page = Reader(render_html(evil).read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.elements} <= ELEMENTS
    named = [(k, v) for _, attrs in page.elements for k, v in attrs.items()]
    assert not [k for k, _ in named if k.startswith("on") or k in ("srcdoc", "action", "formaction", "ping", "poster")]
    assert all(v.startswith("data:image/png;base64,") for k, v in named if k == "src")
    assert all(v.startswith(("#", "http://evil.example")) for k, v in named if k == "href")
    assert [attrs.get("id") for tag, attrs in page.elements if tag == "script"] == ["library", "marks", "data", None]
    text = " ".join(page.text.split())
    for name in (f"model {SHOWN}", f"- [ ] {SHOWN}", f"# {SHOWN}"):  # model, problem, task
        assert name.removeprefix("model ") in text, name
    assert "Cost" in text and "<!-- made by dora-nb report" in render(evil).read_text(encoding="utf-8").splitlines()[-1]


@pytest.mark.attack("hostile input")
def test_the_markdown_page_has_its_sections_after_a_block_of_code_that_nobody_closed(evil):
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(render(evil).read_text(encoding="utf-8"))
    page = Reader(html)
    assert {"table", "h2", "img"} <= {tag for tag, _ in page.elements} <= ELEMENTS
    assert html.count("<h1") == 1 and "<input" not in html
    heads = [i for i, (tag, _) in enumerate(page.elements) if tag == "h2"]
    assert len(heads) >= 6
    assert {attrs["src"] for tag, attrs in page.elements if tag == "img"} <= {
        *(p.name for p in evil.glob("*.png")),
        "http://evil.example/x.png",  # of the grid file's own Markdown
    }


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize(
    "text", ["# a", "- a", "+ a", "1. a", "12) a", "---", "- - -", "[ ] a", "[x] a", "     a", "[a]: b"]
)
def test_text_begins_no_block(text):
    from markdown_it import MarkdownIt

    from dora_nb.results.text import markdown_text

    html = MarkdownIt("commonmark").render(f"- {markdown_text(text)}\n- [a] b")
    assert html == f"<ul>\n<li>{text.strip()}</li>\n<li>[a] b</li>\n</ul>\n"


# --- in a browser


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("there is no Chromium here")
    with playwright.sync_playwright() as p:
        yield p.chromium.launch(executable_path=path, args=["--no-sandbox"])


@pytest.fixture
def opened(browser):
    "Opens a page and returns it with what it said, and asked of any host."
    contexts = []

    def open_page(path, **options):
        contexts.append(browser.new_context(**dict(viewport={"width": 1280, "height": 800}) | options))
        page, said = contexts[-1].new_page(), []
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("dialog", lambda d: (said.append(d.message), d.dismiss()))
        page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("data:", "blob:", "file:")) else None)
        page.goto(path.resolve().as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        return page, said

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.attack("hostile input")
@pytest.mark.parametrize("bypass_csp", (False, True))
def test_a_browser_shows_hostile_text_and_runs_none_of_it(evil, opened, bypass_csp):
    "With the page's policy, which would report what it stops, and without it: nothing is left to be stopped."
    page, said = opened(render_html(evil), bypass_csp=bypass_csp)
    for chosen in ("1", "3", "2", "0"):
        page.select_option("#show", chosen)
    assert page.locator("#items p").first.text_content() == TEXTS[0]
    assert page.locator("#items li").nth(0).text_content().startswith(f"yes {EVIL}".strip())
    assert page.locator("#group option").first.text_content().startswith(f"# {EVIL}")
    box = page.locator(".evidence img").bounding_box()
    for x in range(0, int(box["width"]), 8):
        page.mouse.move(box["x"] + x, box["y"] + box["height"] / 3)
    assert SHOWN[:40] in page.locator(".evidence output").text_content()
    for head in page.locator("th").all():
        head.click(force=True)
    page.fill("#questions input[type=search]", "<img src=x onerror=alert(4)>")
    assert page.locator("#questions .dt-info").text_content() == "no question (of 30)"
    assert not said
    assert page.evaluate("document.querySelectorAll('script').length") == 4


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    "The page of reports/quick."
    return render_html(copy_of(QUICK, tmp_path_factory.mktemp("page") / "quick"))


def counts(folder, task):
    "In how many items two methods differ, and one of them is right more often: from the stored answers."
    found = read_report(folder)
    own = {r["params"]["method"]: r["run"] for r in found.results if r["params"]["task"] == task}
    by = found.predictions.set_index(["run", "doc_index"])
    lora, dora = (by.loc[own[method]] for method in ("lora", "dora"))
    right = (dora.pred == dora.gold).astype(int) - (lora.pred == lora.gold).astype(int)
    return len(lora), int((lora.pred != dora.pred).sum()), int((right < 0).sum()), int((right > 0).sum())


def copy_of(folder, to):
    return Path(shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.md", "*.png", ".*")))


def test_the_page_filters_sorts_and_searches(quick, opened):
    from playwright.sync_api import expect

    page, said = opened(quick)
    info = page.locator("#questions .dt-info")
    for i, task in enumerate(("boolq", "hellaswag", "winogrande")):
        page.select_option("#group", str(i))
        for chosen, expected in enumerate(counts(QUICK, task)):
            page.select_option("#show", str(chosen))
            assert info.text_content().endswith(f"of {expected} questions" if expected else "no question")
    cells = page.locator(".evidence tbody td:nth-child(2)")
    value = lambda text: float(text.split()[0])
    before = cells.all_text_contents()
    for falling in (False, True):
        page.locator(".evidence th").nth(1).click()
        expect(cells).to_have_text(sorted(before, key=value, reverse=falling))
    page.select_option("#show", "0")
    found, word = read_report(QUICK), "because"
    (group,) = [g for g in item_groups(found) if g["name"].startswith("WinoGrande")]
    page.fill("#questions input[type=search]", word)
    expected = sum(any(word in text.lower() for text in (q, *choices)) for q, choices in group["texts"])
    assert 0 < expected < 160 and f"of {expected} questions" in info.text_content()
    assert not said


def test_answer_figure_and_table_are_seen_without_scrolling(quick, opened):
    page, _ = opened(quick)
    for part in (".evidence figure", ".evidence table"):
        box = page.locator(part).bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 800
    for scheme, dark in (("light", False), ("dark", True)):
        page, _ = opened(quick, viewport={"width": 390, "height": 844}, color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, color[4:-1].split(","))) < 384) == dark
        assert page.locator("#items td").nth(1).is_visible()


def test_a_point_under_the_pointer_shows_its_value(quick, opened):
    page, _ = opened(quick)
    marks = page.evaluate("async () => JSON.parse(await unpack('marks'))")
    low, high = wilson(62, 160)
    own = marks["accuracy-loglikelihood-validation.png"][0][2]
    assert own == f"BoolQ (n = 160)\nbase model: 38.75 [{100 * low:.4g}, {100 * high:.4g}]"
    (x, y, text), *_ = marks["differences.png"]
    row = differences(QUICK).iloc[0]
    assert text == f"BoolQ: {row.difference:.4g} [{row.low:.4g}, {row.high:.4g}]"
    box = page.locator(".evidence img").bounding_box()
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    assert page.locator(".evidence output").inner_text() == text
    page.mouse.move(5, 5)
    assert not page.locator(".evidence output").is_visible()


# --- files


def test_the_same_results_give_the_same_bytes(quick, tmp_path):
    again = copy_of(QUICK, tmp_path / "quick")
    code = f"from dora_nb.results.html import render_html; render_html({str(again)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert quick.read_bytes() == (again / "report.html").read_bytes()
    for name in ("report.md", *(p.name for p in QUICK.glob("*.png"))):
        assert (quick.parent / name).read_bytes() == (again / name).read_bytes(), name
    assert (again / "report.md").read_bytes() == (QUICK / "report.md").read_bytes()


@pytest.mark.attack("data loss")
def test_only_a_page_of_ours_is_overwritten(evil, capsys):
    out = evil
    (out / "report.html").write_text("<p>mine</p>")
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert main(["report", str(out), "--html"]) == 2
    assert "report.html exists, and this command did not write it" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before
    assert main(["report", str(out)]) == 0 and (out / "report.html").read_text() == "<p>mine</p>"
    (out / "report.html").unlink()
    assert main(["report", str(out), "--html"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("report.html")
    edited = (out / "report.html").read_text(encoding="utf-8").replace("</h1>", " (mine)</h1>")
    (out / "report.html").write_text(edited, encoding="utf-8")
    assert main(["report", str(out), "--html"]) == 0
    assert (out / "report.edited.html").read_text(encoding="utf-8") == edited


def test_html_without_its_packages_says_what_to_install(tmp_path, monkeypatch, capsys):
    from dora_nb.runs import jobs

    find = jobs.importlib.util.find_spec
    monkeypatch.setattr(jobs.importlib.util, "find_spec", lambda name: None if name == "itables" else find(name))
    out = copy_of(QUICK, tmp_path / "quick")
    assert main(["report", str(out), "--html"]) == 1
    assert "itables is needed" in (said := capsys.readouterr().err) and "'.[html]'" in said
    assert not (out / "report.md").exists()


# --- questions


def test_without_the_data_the_page_shows_numbers_and_says_so(tmp_path, monkeypatch, opened):
    monkeypatch.setenv("DORA_NB_CACHE", str(tmp_path / "empty"))
    page, said = opened(render_html(copy_of(QUICK, tmp_path / "quick")))
    assert "its data are not in the cache; `dora-nb fetch tasks` brings them" in page.locator("#why").text_content()
    assert page.locator("#items li").first.text_content().startswith("choice 0")
    assert not said and not (tmp_path / "empty").exists()


@pytest.mark.attack("silent error")
def test_questions_of_other_data_are_not_shown():
    found = read_report(QUICK)
    example = found.results[0]
    gold = found.predictions[found.predictions.run == example["run"]].set_index("doc_index").gold
    params = parameters(example)
    assert len(item_texts(params, gold)[0]) == 160
    for other in (1 - gold, gold.rename(lambda i: i + 1_000_000)):
        assert "other items or other right answers" in item_texts(params, other)[1]
    assert "not those that the runs read" in item_texts(params, gold, "0" * 64)[1]
    assert "no such task" in item_texts(params | {"task": "mmlu"}, gold)[1]
    assert "not in the cache" in item_texts(params | {"source": "hub"}, gold)[1]


def test_long_texts_are_cut_where_a_page_would_be_too_large():
    words = lambda n: "".join(chr(97 + i) for i in rng.integers(0, 26, n))
    rng = np.random.default_rng(0)
    texts = [(f"{i} {words(450)} {i}?", [words(200), "no"]) for i in range(500)]
    group = {"name": "x", "texts": texts, "why": ""}
    assert pack_items([group, {"name": "y", "texts": None, "why": "no data"}])[1] is None
    packed, _ = pack_items([group])
    small, cut = pack_items([group], len(packed) - 1)
    assert cut == 400 and len(small) < len(packed)
    question, choices = json.loads(zlib.decompress(base64.b64decode(small)))[0]["texts"][7]
    assert question == f"{texts[7][0][:200]} … {texts[7][0][-200:]}" and choices == texts[7][1]
    assert pack_items([group], 10)[1] == 50
