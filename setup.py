"Everything about the package is in settings.ini; this reads it."

import configparser
import shlex
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = configparser.ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
extras = ("runs", "ray", "compress", "html", "dev", "docs")
runs, ray, compress, html, dev, docs = (shlex.split(cfg[f"{extra}_requirements"]) for extra in extras)

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    keywords=cfg["keywords"].split(),
    license="Apache-2.0",
    url=f"https://github.com/{cfg['user']}/{cfg['repo']}",
    project_urls={
        "Source": f"https://github.com/{cfg['user']}/{cfg['repo']}",
        "Changelog": f"https://github.com/{cfg['user']}/{cfg['repo']}/blob/{cfg['branch']}/CHANGELOG.md",
        "Results": f"https://github.com/{cfg['user']}/{cfg['repo']}/tree/{cfg['branch']}/reports",
        "Paper": "https://arxiv.org/abs/2402.09353",
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: English",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    license_files=["LICENSE"],
    python_requires=f">={cfg['min_python']}",
    install_requires=shlex.split(cfg["requirements"]),
    extras_require={
        "runs": runs,
        "ray": runs + ray,
        "compress": compress,
        "html": runs + html,
        "dev": runs + ray + html + dev,
        "docs": docs,
    },
    # The papermill notebooks travel inside the package, so that `dora-nb run` works from a wheel too.
    packages=[*find_packages(include=["dora_nb*"]), "dora_nb.notebooks"],
    package_dir={"dora_nb.notebooks": "nbs/runs"},
    package_data={"dora_nb": ["py.typed", "results/report.*"], "dora_nb.notebooks": ["*.ipynb"]},
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"])},
    zip_safe=False,
)
