"""Builds the documentation as a site: `python docs/build_site.py OUT` (needs `pip install .[docs]`; no network).

The pages are those of the repository, which GitHub shows as well: README.md is the start page, and links to files that
are no page become plain text. The reference is made of the docstrings of `re2tal.__all__` and of PACKAGES.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PAGES = {
    "README.md": "index.md",
    **{f"docs/{path.name}": path.name for path in sorted((ROOT / "docs").glob("*.md"))},
    "shards/README.md": "shards.md",
    "samples/README.md": "samples.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""Page of the repository -> page of the site."""

MENU = {
    "Start": ["index.md", "concepts.md", "own_data.md", "view.md", "faq.md"],
    "Guides": ["recipes.md", "backbones.md", "cluster.md", "shards.md", "samples.md"],
    "Evidence": ["comparison.md", "results.md", "evidence.md", "experiments.md"],
    "Code": ["architecture.md", "api.md", "contributing.md", "changelog.md"],
}

PACKAGES = ("re2tal.rewire", "re2tal.reversible", "re2tal.backbones", "re2tal.structures", "re2tal.evaluation.results")
"""Modules whose public names are documented beside those of `re2tal` itself."""

CONFIG = """\
site_name: re2tal
site_description: End-to-end temporal action localization with reversible video backbones
docs_dir: pages
site_dir: site
use_directory_urls: false
theme:
  name: material
  font: false
  features: [navigation.tabs, navigation.indexes, content.code.copy, search.highlight]
  palette:
    - {media: "(prefers-color-scheme: light)", scheme: default, toggle: {icon: material/weather-night, name: dark}}
    - {media: "(prefers-color-scheme: dark)", scheme: slate, toggle: {icon: material/weather-sunny, name: light}}
markdown_extensions:
  - tables
  - admonition
  - attr_list
  - toc: {permalink: true, slugify: !!python/object/apply:pymdownx.slugs.slugify {kwds: {case: lower}}}
  - pymdownx.highlight
  - pymdownx.superfences
plugins:
  - search
  - mkdocstrings:
      handlers:
        python:
          options: {show_source: false, show_root_heading: true, show_root_full_path: true, heading_level: 3,
                    docstring_style: google, separate_signature: true, show_signature_annotations: true,
                    members_order: source, merge_init_into_class: true, filters: ["!^_"]}
extra_css: [contrast.css]
extra_javascript: [tables.js]
nav:
"""

CONTRAST = """\
.md-nav__link--active, .md-nav__link--active * { color: var(--md-default-fg-color) !important; font-weight: bold; }
.doc-labels code { color: var(--md-default-fg-color) !important; }
"""
"""Of the theme's colors, those that WCAG's ratio of 4.5 to 1 asks to be darker on white, and lighter on black."""

TABLES = """\
addEventListener("load", () => {
  for (const table of document.querySelectorAll(".md-typeset__scrollwrap"))
    if (table.scrollWidth > table.clientWidth)
      Object.assign(table, {tabIndex: 0, role: "region", ariaLabel: "table, wider than the page"});
});
"""
"""Tables wider than the page can be reached, and scrolled, by keyboard."""

ITEM = re.compile(r"(?:[-*]|[0-9]+\.) ")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def page(source: str, text: str, pictures: set[str]) -> str:
    """The text of a page with links that hold in the site; adds the pictures that it shows, as files of ROOT."""

    def link(match: re.Match) -> str:
        picture, words, target = match.groups()
        path, hash_sign, anchor = target.partition("#")
        if "://" in target or not path:
            return match.group()
        found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if found in PAGES:
            return f"[{words}]({PAGES[found]}{hash_sign}{anchor})"
        if picture or found.endswith((".svg", ".png")):
            pictures.add(found)
            return f"{picture}[{words}](pictures/{posixpath.basename(found)})"
        return words

    lines, in_code = [], False
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith("```")
        lines.append(line if in_code else LINK.sub(link, line))
    return "\n".join(lines) + "\n"


def spaced(text: str) -> str:
    """The text with what the site's Markdown wants and GitHub's does not: empty lines before lists and tables, and four
    spaces before what belongs to a numbered item."""
    lines, in_code, in_item = [""], False, False
    for line in text.splitlines():
        before = lines[-1]
        if line and not in_code:
            # A number behind an item's second paragraph would be of that paragraph.
            begins_list = ITEM.match(line) and not ITEM.match(before) and (line[0].isdigit() or before[:1] != " ")
            begins_table = line.startswith("|") and not before.startswith("|")
            if before and (begins_list or begins_table):
                lines.append("")
            in_item = line[0].isdigit() if ITEM.match(line) else in_item and line[0] == " "
        in_code ^= line.lstrip().startswith("```")
        lines.append(f" {line}" if in_item and line.startswith("   ") else line)
    return "\n".join(lines[1:]) + "\n"


def joined(text: str) -> str:
    """The text with links that go over a line's end brought into one line."""
    return re.sub(r"\[([^\]\n]*)\n([^\]\n]*)\]\(", r"[\1 \2](", text)


def reference() -> str:
    """The page of public names, which are documented from their docstrings."""
    lines = ["# Reference", "", "Names with their arguments, shapes, units and errors, from the code's docstrings.", ""]
    for module_name in ("re2tal", *PACKAGES):
        module = importlib.import_module(module_name)
        public = getattr(module, "__all__", None) or [
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module_name
        ]
        lines += [f"## `{module_name}`", ""]
        for name in sorted(public):
            value = getattr(module, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                lines += [f"::: {value.__module__}.{value.__qualname__}", ""]
            elif name == "rewire":  # a package that can be called
                lines += ["::: re2tal.rewire.rewire.rewire", ""]
    seen: set[str] = set()
    return "\n".join(line for line in lines if not line.startswith(":::") or not (line in seen or seen.add(line)))


def assemble(folder: Path) -> None:
    """Writes pages, pictures and the site's configuration into `folder`."""
    pages, pictures = folder / "pages", set[str]()
    (pages / "pictures").mkdir(parents=True)
    for source, name in PAGES.items():
        (pages / name).write_text(page(source, spaced(joined((ROOT / source).read_text())), pictures))
    (pages / "api.md").write_text(reference())
    (pages / "contrast.css").write_text(CONTRAST)
    (pages / "tables.js").write_text(TABLES)
    for picture in pictures:
        shutil.copy(ROOT / picture, pages / "pictures")
    missing = {*PAGES.values(), "api.md"} - {name for names in MENU.values() for name in names}
    if missing:
        raise SystemExit(f"not in the site's menu: {sorted(missing)}; add them to MENU in docs/build_site.py")
    menu = "".join(f"  - {title}: [{', '.join(names)}]\n" for title, names in MENU.items())
    (folder / "mkdocs.yml").write_text(CONFIG + menu)


def build(out: Path) -> None:
    """Writes the site into the folder `out`, which must not exist; SystemExit with the builder's words if it fails."""
    if out.exists():
        raise SystemExit(f"{out} exists; name a new folder")
    with tempfile.TemporaryDirectory() as temporary:
        assemble(Path(temporary))
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"zensical failed:\n{done.stdout}{done.stderr}")
        shutil.copytree(Path(temporary) / "site", out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder that does not exist yet")
    build(parser.parse_args().out)
