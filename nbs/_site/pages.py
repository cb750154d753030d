"Which file of the repository becomes which page of the site, and where the links between them lead."

import json
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote, unquote

CONTENTS = "nbs/README.md"
ROOT = Path(__file__).parents[2]
CODE = re.compile(r"(^ *(```+|~~~+).*?^ *\2|(?<!`)(`+)(?!`).+?(?<!`)\3(?!`))", re.M | re.S)
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^()\s]+)\)")
LINK = re.compile(r"(?<=\]\()([^()\s]+)(?=[)\s])")


def chapters() -> list[Path]:
    "Return the chapters of the book, in order, as paths below the repository."
    return [p.relative_to(ROOT) for p in sorted((ROOT / "nbs").glob("[0-9]*/[0-9]*.ipynb"))]


def reports() -> list[Path]:
    "Return the reports, those in the table of the overview first and in its order."
    overview = (ROOT / "reports" / "README.md").read_text()
    found = [p.relative_to(ROOT) for p in sorted((ROOT / "reports").rglob("report.md"))]
    table = overview[overview.find("\n|") :]
    place = {path: table.find(f"({path.relative_to('reports').as_posix()})") for path in found}
    return sorted(found, key=lambda path: (place[path] < 0, place[path]))


def site_pages() -> dict[str, str]:
    "Return the page of every file that has one, and of parts: path in the repository → path in the site's source."
    same = [*chapters(), *reports(), *(p.relative_to(ROOT) for p in (ROOT / "nbs").glob("*.ipynb"))]
    same += [
        Path(name) for name in (CONTENTS, "reports/README.md", "reports/LOG.md", "CHANGELOG.md", "CONTRIBUTING.md")
    ]
    pages = {path.as_posix(): path.as_posix() for path in same}
    how_to = {p.relative_to(ROOT).as_posix(): f"how-to/{p.name}" for p in (ROOT / "nbs/_site/how-to").glob("*.md")}
    folders = {path.parent.as_posix(): f"{path.parent.as_posix()}/index.md" for path in chapters()}
    return pages | how_to | folders | {"README.md": "index.md", "nbs/index.ipynb": "index.md"}


def outside_code(text: str, change: Callable[[str], str]) -> str:
    "Change the parts of a Markdown text that are not code."
    done, start = [], 0
    for found in CODE.finditer(text):
        done += [change(text[start : found.start()]), found[0]]
        start = found.end()
    return "".join([*done, change(text[start:])])


class Links:
    "Rewrite the links of pages: to another page, to a picture, or to a file on GitHub."

    def __init__(self, pages: dict[str, str], repository: str, branch: str):
        self.pages, self.repository, self.branch = pages, repository, branch
        self.pictures = {}  # path in the repository → path in the site's source

    def target(self, link: str, origin: str, page: str) -> str:
        "Return where a link of the file `origin` leads from its page; unchanged if it leads nowhere, so that Sphinx warns."
        path, mark, anchor = unquote(link).partition("#")
        if not path or re.match(r"[a-z]+:", link):
            return link
        file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), path))
        if file in self.pages:
            return posixpath.relpath(self.pages[file], posixpath.dirname(page) or ".") + mark + anchor
        if not (ROOT / file).exists():
            return link
        if file.endswith((".png", ".svg")):
            self.pictures[file] = file
            return posixpath.relpath(file, posixpath.dirname(page) or ".")
        kind = "tree" if (ROOT / file).is_dir() else "blob"
        return f"{self.repository}/{kind}/{self.branch}/{quote(file)}{mark}{anchor}"

    def rewrite(self, text: str, origin: str, page: str) -> str:
        "Return a Markdown text with all its links rewritten."
        return outside_code(text, lambda part: LINK.sub(lambda m: self.target(m[1], origin, page), part))

    def rewrite_output(self, text: str, origin: str, page: str) -> str:
        "Return what a cell has printed, with its links rewritten; a picture that was not kept becomes its caption."
        kept = lambda m: m[0] if (ROOT / origin).parent.joinpath(m[2]).exists() else f"*{m[1]}*"
        return self.rewrite(PICTURE.sub(kept, text), origin, page)


def title(path: Path) -> str:
    "Return the first heading of a page."
    text = (ROOT / path).read_text()
    if path.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    return re.search(r"^# (.+)$", text, re.M)[1]


def parts() -> Iterator[tuple[str, str, str]]:
    "Yield the folder, the name and the table of each part of the book, as its contents list them."
    text = (ROOT / CONTENTS).read_text()
    for name, table in re.findall(r"^## ([^\n]+)\n\n(\| chapter .+?)\n(?:\n|\Z)", text, re.M | re.S):
        yield posixpath.normpath(posixpath.join("nbs", posixpath.dirname(LINK.search(table)[1]))), name, table
