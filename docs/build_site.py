"""Builds the documentation as a site: `python docs/build_site.py`, or `make docs`, which installs the tools first.

Pages link to files all over the repository: results of benchmarks, sources, examples. The site therefore mirrors it.
Sphinx reads copies of what is published, in one folder, so that the links of a page work in the repository and in the
site alike. Whatever Sphinx warns of, a dead link above all, is an error.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "docs",
    "benchmarks",
    "examples",
    "moescale",
    "tests",
)
SOURCES = ROOT / "build" / "site-sources"
SITE = ROOT / "build" / "site"


def gather() -> None:
    """Make the folder that Sphinx reads anew, and drop the last site, whose menus Sphinx would not change."""
    shutil.rmtree(SITE, ignore_errors=True)
    shutil.rmtree(SOURCES, ignore_errors=True)
    SOURCES.mkdir(parents=True)
    for name in PUBLISHED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, SOURCES / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, SOURCES / name)


def main() -> None:
    gather()
    command = ["-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", "-b", "html", "-c", str(ROOT / "docs")]
    done = subprocess.run([sys.executable, *command, str(SOURCES), str(SITE)])
    if done.returncode == 0:
        print(f"written to {SITE / 'docs' / 'index.html'}")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
