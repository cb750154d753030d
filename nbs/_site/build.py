"""Build the documentation site: `python nbs/_site/build.py _docs`.

The pages are assembled in build/site, each at the path that its source has in the repository, and Sphinx renders them.
No notebook is executed, and the pages need no network.
"""

import argparse
import configparser
import functools
import os
import posixpath
import shutil
import sys
from pathlib import Path

import api
import pages
from notebooks import page_notebook
from pages import ROOT
from sphinx.cmd.build import main as sphinx

SOFTWARE = ("reports/speed/report", "reports/reliability/report")  # reports on the package, not on the methods
HOW_TO = ("model", "peft", "trainer", "data", "gpus", "slurm", "ray", "offline")  # in the order of the navigation


def toctree(entries: list[str], caption: str = "") -> str:
    "Return a table of contents; an entry is a page, or `title <page>`."
    options = f":caption: {caption}\n:hidden:\n" if caption else ":hidden:\n"
    return "\n```{toctree}\n" + options + "\n" + "\n".join(entries) + "\n```\n"


def numbered(path: Path) -> str:
    "Return a chapter's entry in the navigation."
    number = path.stem.split("_")[0]
    return f"{number} {pages.title(path)} </{path.with_suffix('').as_posix()}>"


def report_entry(path: Path) -> str:
    "Return a report's entry in the navigation, with its scale."
    folders = path.parent.relative_to("reports").parts
    scale = f" ({folders[-1]})" if len(folders) > 1 else ""
    return f"{pages.title(path)}{scale} </{path.with_suffix('').as_posix()}>"


class Site:
    "Write the pages of the site into a folder."

    def __init__(self, folder: Path):
        ini = configparser.ConfigParser(delimiters=["="])
        ini.read(ROOT / "settings.ini", encoding="utf-8")
        cfg = ini["DEFAULT"]
        self.folder, self.pages = folder, pages.site_pages()
        self.links = pages.Links(self.pages, f"https://github.com/{cfg['user']}/{cfg['repo']}", cfg["branch"])

    def write(self, page: str, text: str):
        path = self.folder / page
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def copy_pages(self):
        "Write the pages that are files of the repository, except the front page."
        for origin, page in self.pages.items():
            if page == "index.md" or (ROOT / origin).is_dir():
                continue
            rewrite, rewrite_output = (
                functools.partial(change, origin=origin, page=page)
                for change in (self.links.rewrite, self.links.rewrite_output)
            )
            text = (ROOT / origin).read_text(encoding="utf-8")
            if origin.endswith(".ipynb"):
                up = posixpath.relpath("api", posixpath.dirname(page))
                api_page = lambda module: f"{up}/{module.replace('.', '/')}.md"
                text = page_notebook(text, api_page, rewrite, rewrite_output)
            else:
                text = rewrite(text)
            if origin == "reports/README.md":
                inside = [p for p in pages.reports() if p.with_suffix("").as_posix() not in SOFTWARE]
                text += toctree([report_entry(p) for p in inside])
            self.write(page, text)

    def front_page(self):
        "Write the README, with the navigation of the whole site."
        text = self.links.rewrite((ROOT / "README.md").read_text(encoding="utf-8"), "README.md", "index.md")
        folders = [f"{folder}/index" if folder != "nbs" else "nbs/appendix" for folder, _, _ in pages.parts()]
        text += toctree(["nbs/tour", "Contents <nbs/README>", *folders], "The book")
        text += toctree([f"how-to/{name}" for name in HOW_TO], "How to")
        text += toctree(["reports/README", *SOFTWARE, "reports/LOG"], "Results")
        text += toctree(["commands/index", "api/index", "nbs/glossary", "CHANGELOG", "CONTRIBUTING"], "Reference")
        self.write("index.md", text)

    def part_pages(self):
        "Write a page for each part of the book: its chapters, with what they are about."
        for folder, name, table in pages.parts():
            page = f"{folder}/index.md" if folder != "nbs" else "nbs/appendix.md"
            inside = [p for p in pages.chapters() if p.parent.as_posix() == folder]
            others = [f"/nbs/{Path(link).stem}" for link in pages.LINK.findall(table) if "glossary" not in link]
            entries = [numbered(p) for p in inside] or others
            self.write(
                page, f"# {name}\n\n" + self.links.rewrite(table, pages.CONTENTS, page) + "\n" + toctree(entries)
            )

    def api_pages(self):
        "Write a page for each module, one for each part of the package, and one for all."
        groups, names = {}, {folder: name for folder, name, _ in pages.parts()}
        found = sorted(api.modules(), key=lambda module: module.notebook)
        for module in found:
            page = f"api/{module.name.replace('.', '/')}.md"
            link = posixpath.relpath(module.notebook, posixpath.dirname(page))
            self.write(page, api.module_page(module, pages.title(Path(module.notebook)), link))
            groups.setdefault(posixpath.dirname(module.notebook), []).append(module)
        text, entries = api.index_head(found), []
        for folder, group in sorted(groups.items(), key=lambda item: (item[0] == "nbs", item[0])):
            part = group[0].name.rpartition(".")[0]
            text += f"\n## {names[folder]}\n\n{api.module_table(group, 'api')}"
            inside = toctree([f"{module.name} </api/{module.name.replace('.', '/')}>" for module in group])
            page = f"api/{part}/index" if part else "api/appendix"
            self.write(
                f"{page}.md", f"# {part or 'Appendix'}\n\n{api.module_table(group, posixpath.dirname(page))}\n{inside}"
            )
            entries.append(f"/{page}")
        self.write("api/index.md", text + toctree(entries))

    def command_pages(self):
        "Write a page for each command, and one that lists them."
        from commands import command_pages, commands_table, exit_status

        pages_of = command_pages()
        for name, text in pages_of.items():
            self.write(f"commands/{name}.md", text)
        text = (Path(__file__).parent / "commands.md").read_text(encoding="utf-8")
        text = text.replace("COMMANDS", commands_table()).replace("STATUS", exit_status())
        self.write("commands/index.md", text + toctree(list(pages_of)))

    def assemble(self):
        "Write all pages and copy their pictures."
        for write in (self.copy_pages, self.front_page, self.part_pages, self.api_pages, self.command_pages):
            write()
        for origin, place in self.links.pictures.items():
            (self.folder / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / origin, self.folder / place)


def render(source: Path, out: Path) -> int:
    "Render the pages of a folder, and return Sphinx's exit status; a warning, such as one of a broken link, is an error."
    options = ["-q", "-W", "--keep-going", "-j", "auto", "-c", str(Path(__file__).parent)]
    return sphinx([*options, "-d", str(out.with_name("doctrees")), str(source), str(out)])


def build(out: Path, work: Path) -> int:
    "Assemble the pages in the folder `work`, render them to `out`, and return Sphinx's exit status."
    if out.exists() and any(out.iterdir()) and not (out / ".buildinfo").exists():
        raise SystemExit(f"{out} holds other files; nothing is written over them")
    shutil.rmtree(work, ignore_errors=True)
    Site(work / "source").assemble()
    status = render(work / "source", work / "html")
    if not status:
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(work / "html", out)
    return status


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("out", type=Path, help="folder of the site, which is replaced")
    arguments.add_argument("--work", type=Path, default=ROOT / "build" / "site", help="folder for what is in between")
    given = arguments.parse_args()
    os.chdir(ROOT)
    sys.exit(build(given.out.resolve(), given.work.resolve()))
