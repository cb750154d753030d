"Turn a notebook of nbdev into one that reads well as a page: without directives, with imports folded away."

import ast
import json
import re

DIRECTIVE = re.compile(r"^#\| *(.*)\n?", re.M)


def _only_imports(source: str) -> bool:
    try:
        body = ast.parse(source).body
    except SyntaxError:  # a line of IPython's own, such as %pip
        return False
    return bool(body) and all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in body)


def _exported_to(module: str, api: str) -> dict:
    text = f"The code below with a coloured edge is the module [`dora_nb.{module}`]({api})."
    return {
        "cell_type": "markdown",
        "id": "exported-to",
        "metadata": {},
        "source": f"```{{container}} exported-to\n{text}\n```",
    }


def page_cells(cells: list[dict], api, rewrite) -> list[dict]:
    "Return the cells of a page; `api` gives the page of a module, and `rewrite` changes the links of a text."
    kept = []
    for cell in cells:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            kept.append(cell | {"source": rewrite(source)})
            continue
        directives = DIRECTIVE.findall(source)
        source = DIRECTIVE.sub("", source).strip("\n")
        if module := [d.split()[1] for d in directives if d.startswith("default_exp")]:
            kept.append(_exported_to(module[0], api(module[0])))
        if not source or "hide" in directives:
            continue
        tags = ["exported"] if "export" in directives else []
        page_cell = cell | {"source": source, "metadata": {"tags": tags}}
        if _only_imports(source):
            if kept and kept[-1].get("imports"):
                kept[-1]["source"] += "\n\n" + source
                continue
            names = {"code_prompt_show": "Imports", "code_prompt_hide": "Imports"}
            page_cell |= {"imports": True, "metadata": {"tags": [*tags, "hide-input"], "mystnb": names}}
        kept.append(page_cell)
    for cell in kept:
        cell.pop("imports", None)
    return kept


def page_notebook(text: str, api, rewrite, rewrite_output) -> str:
    "Return the notebook of a page, as JSON."
    nb = json.loads(text)
    nb["cells"] = page_cells(nb["cells"], api, rewrite)
    nb["metadata"]["language_info"] = {"name": "python", "pygments_lexer": "python"}
    nb["metadata"]["kernelspec"] = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for cell in nb["cells"]:
        for output in cell.get("outputs", []):
            if text := output.get("data", {}).get("text/markdown"):
                output["data"]["text/markdown"] = rewrite_output("".join(text))
    return json.dumps(nb, ensure_ascii=False)
