"Sphinx's configuration; `build.py` assembles the pages and calls Sphinx."

import configparser
import re
from importlib.resources import files
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.util import logging

_ini = configparser.ConfigParser(delimiters=["="])
_ini.read(Path(__file__).parents[2] / "settings.ini", encoding="utf-8")
_cfg = _ini["DEFAULT"]

project, author, release = _cfg["title"], _cfg["author"], _cfg["version"]
copyright = _cfg["copyright"]
language = "en"
extensions = ["myst_nb", "sphinx.ext.githubpages"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}

nb_ipywidgets_js = {}  # from another host
nb_execution_mode = "off"  # what the notebooks store is shown
nb_render_markdown_format = "myst"
myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_dmath_double_inline = True
myst_heading_anchors = 3
smartquotes_action = "qe"  # quotes and ellipses; two hyphens begin an option
python_maximum_signature_line_length = 70
add_module_names = False
suppress_warnings = ["myst.header"]  # a text may begin with a smaller heading

html_theme = "sphinx_book_theme"
html_title = project
html_favicon = "static/favicon.svg"
html_static_path = ["static", str(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")]
html_css_files = ["site.css"]
html_js_files = [("site.js", {"defer": "defer"})]
html_context = {"default_mode": "auto"}  # light or dark, as the reader's system
html_show_sourcelink = False
html_copy_source = True  # for the download of notebooks
html_theme_options = {
    "repository_url": f"https://github.com/{_cfg['user']}/{_cfg['repo']}",
    "repository_branch": _cfg["branch"],
    "path_to_docs": "",
    "use_repository_button": True,
    "launch_buttons": {"colab_url": "https://colab.research.google.com", "binderhub_url": "https://mybinder.org"},
    "collapse_navbar": True,  # only the part that is open is listed: half of the time of the build
    "show_toc_level": 2,
    "navigation_with_keys": False,
}


UNSTRETCHED = re.compile("<mo>(&#x02016;|&#x0007C;|&#x02223;|&#x027E8;|&#x027E9;)</mo>")  # without \\left and \\right


def _mathml(display: str):
    "Return the visitor of a formula."

    def visit(translator, node):
        try:
            formula = UNSTRETCHED.sub(r'<mo stretchy="false">\1</mo>', convert(node.astext(), display=display))
            translator.body.append(formula if display == "inline" else f'<div class="math">{formula}</div>')
        except Exception as e:
            logging.getLogger(__name__).warning("no formula: %r (%s)", node.astext(), type(e).__name__, location=node)
        raise SkipNode

    return visit


def setup(app):
    "Render mathematics as MathML, which browsers draw without any script."
    app.add_html_math_renderer("mathml", (_mathml("inline"), None), (_mathml("block"), None))
    app.config.html_math_renderer = "mathml"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
