"""The documentation site: its links, its pages in a real browser, and the commands and programs of its how-to pages.

`DORA_NB_SITE=_docs pytest tests/test_docs.py` looks at a site that is built already.
"""

import contextlib
import functools
import http.server
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from filelock import FileLock

from dora_nb.command.parser import COMMANDS, parse, parser

ROOT = Path(__file__).parent.parent
HOW_TO = sorted((ROOT / "nbs/_site/how-to").glob("*.md"))
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "The folder of the site; processes that run tests beside this one share it."
    if given := os.environ.get("DORA_NB_SITE"):
        return Path(given).resolve()
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            command = [sys.executable, ROOT / "nbs/_site/build.py", out, "--work", f"{out}.work"]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
            assert not done.returncode, done.stderr
    return out


def text_of(page):
    "The text of a page, without tags."
    html = page.read_text()
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", html[html.index("<article") : html.index("</article>")]))


def cells(chapter):
    return json.loads(chapter.read_text())["cells"]


def prose(chapter):
    "The text of a chapter, without code."
    text = "\n".join("".join(c["source"]) for c in cells(chapter) if c["cell_type"] == "markdown")
    return re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.S)


def test_pages(site):
    "Every chapter, report, module, command and how-to has a page that shows what it should."
    chapters = sorted((ROOT / "nbs").glob("[0-9]*/[0-9]*.ipynb"))
    reports = sorted((ROOT / "reports").rglob("report.md"))
    for source in [*chapters, *reports, *(ROOT / "nbs" / f"{n}.ipynb" for n in ("tour", "glossary", "files"))]:
        assert (site / source.relative_to(ROOT).with_suffix(".html")).exists()
    assert all((site / "how-to" / f"{path.stem}.html").exists() for path in HOW_TO)
    for chapter in chapters:
        html = (site / chapter.relative_to(ROOT).with_suffix(".html")).read_text()
        assert "#|" not in html and "$$" not in html and "tag_exported" in html
        assert ("<math" in html) == bool(re.search(r"(?<!\\)\$[^$`]+\$", prose(chapter))), chapter.stem
        outputs = [o.get("data", {}) for c in cells(chapter) for o in c.get("outputs", [])]
        drawn = len(re.findall(r"<img[^>]+_images/[0-9a-f]{64}\.png", html))
        assert drawn == sum("image/png" in data for data in outputs), chapter.stem

    method = (site / "api/layers/dora.html").read_text()
    assert 'id="dora_nb.layers.dora.factored_norm"' in method
    assert "W0 Tensor frozen weight, (out, in)" in text_of(site / "api/layers/dora.html")
    fields = text_of(site / "api/training/config.html")
    assert "learning_rate float at the end of the warm-up (default: 0.001)" in fields


def test_commands(site):
    "The page of a command has all its options, with their help."
    same = lambda text: re.sub(r"[`'\"‘’“”]", "", text)  # the site has other quotes
    for name, command in parser(*COMMANDS).commands.items():
        shown = same(text_of(site / "commands" / f"{name}.html"))
        for action in command.actions:
            assert all(option in shown for option in action.option_strings)
            assert same((action.help or "").replace("%%", "%").split(" (")[0].strip()) in shown, action.dest


def test_links(site):
    "Links within the site lead to files, and no page loads anything from another host."
    pages = sorted(
        page for page in site.rglob("*.html") if "_static" not in page.parts
    )  # the theme keeps templates there
    for page in pages:
        html = page.read_text()
        assert not re.search(r"<(script|img|link|iframe|source)\b[^>]*\s(src|href)=\"(https?:)?//", html), page
        tags = " ".join(re.findall(r"<\w+\s[^>]*>", html))  # code on a page may look like an attribute
        for link in set(re.findall(r'\s(?:href|src)="([^"#]+)', tags)):
            parts = urlsplit(link)
            if not parts.scheme and not parts.netloc and parts.path:
                assert (page.parent / unquote(parts.path)).exists(), f"{page.relative_to(site)}: {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style
    total = sum(file.stat().st_size for file in site.rglob("*") if file.is_file())
    print(f"{len(pages)} pages, {total / 2**20:.0f} MiB")


def test_a_broken_link_fails_the_build(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'nbs/_site')!r}); from pathlib import Path; from build import render; sys.exit(render(Path('source'), Path('html')))"
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "index.md").write_text("# A page\n\n[gone](gone.ipynb)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    warnings = [line for line in done.stderr.splitlines() if "WARNING" in line]
    assert done.returncode == 1 and len(warnings) == 1 and "gone.ipynb" in warnings[0], done.stderr


class Files(http.server.SimpleHTTPRequestHandler):
    "Serves files, and keeps what was asked for."

    def log_request(self, code="-", size="-"):
        self.server.asked[self.path] = int(code)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(folder):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory=folder)) as server:
        server.asked = {}
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def opened(browser, server, page, folder):
    "Open a page in a browser; return its HTML after its scripts have run, and the hosts that it has asked for something."
    log = folder / "net.json"
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--virtual-time-budget=20000"]
    command += [f"--log-net-log={log}", "--dump-dom", f"http://127.0.0.1:{server.server_port}/{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    events = [line for line in log.read_text().splitlines() if '"initiator":"http://127.0.0.1' in line]  # not its own
    return done.stdout, {urlsplit(url).hostname for event in events for url in re.findall(r'"url":"([^"]+)"', event)}


def test_in_a_browser(site, tmp_path):
    "Mathematics, figures, tables and search are there, and nothing is asked of another host."
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not browser:
        pytest.skip("no Chromium is installed, so no page was opened in it; the files were checked by the other tests")
    pages = {
        "index.html": r"<img[^>]+src=\"_images/.*Three commands",
        "nbs/1_layers/02_dora.html": r"<math[^>]*>.*<mfrac>.*<img[^>]+_images/",
        "api/layers/dora.html": r"<table.*factor of BA",
        "commands/train.html": r"--learning-rate",
        "search.html?q=magnitude": r'class="search">.*nbs/1_layers/00_decompose\.html.*class="context"',
    }
    with serving(site) as server:
        for page, expected in pages.items():
            html, hosts = opened(browser, server, page, tmp_path)
            assert re.search(expected, html, re.S) and hosts == {"127.0.0.1"}, page
    assert not {path: code for path, code in server.asked.items() if code not in (200, 304)}
    assert any(path.startswith("/_static/STIXTwoMath") for path in server.asked)  # the font of formulas
    assert any(path.startswith("/_images/") for path in server.asked)

    (tmp_path / "other.html").write_text("<img src='http://another.invalid/figure.png'>")
    with serving(tmp_path) as server:
        assert "another.invalid" in opened(browser, server, "other.html", tmp_path)[1]  # such a request would be seen


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.+?)^```$", path.read_text(), re.M | re.S)


@pytest.mark.parametrize("path", HOW_TO, ids=lambda p: p.stem)
def test_commands_of_how_to_pages_parse(path):
    for block in blocks(path, "sh"):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            words = shlex.split(line, comments=True)
            if "dora-nb" in words:
                parse(words[words.index("dora-nb") + 1 :])


@pytest.mark.parametrize("path", [p for p in HOW_TO if blocks(p, "python")], ids=lambda p: p.stem)
def test_programs_of_how_to_pages_run(path, tiny_model_dir, tmp_path, monkeypatch):
    "In a folder with the files that the page shows."
    for name, content in re.findall(r"`([\w-]+\.csv)`:\n\n```text\n(.+?)^```$", path.read_text(), re.M | re.S):
        (tmp_path / name).write_text(content)
    monkeypatch.chdir(tmp_path)
    code = "".join(blocks(path, "python"))
    for name in ("path/to/model", "smollm2-135m-instruct"):
        code = code.replace(name, str(tiny_model_dir))
    exec(compile(code, path.name, "exec"), {})
