"""The documentation as a site: it builds without a network, asks none, and leads everywhere it says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import re2tal

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("docs") / "site"
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}
    command = [sys.executable, str(ROOT / "docs/build_site.py"), str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **offline, "PYTHONPATH": str(ROOT)}, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Targets(HTMLParser):
    """What a page loads, what it links to, and the anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors.add(values.get("id", ""))
        if tag in ("script", "img", "iframe", "source", "video"):
            self.loaded.append(values.get("src", ""))
        elif tag == "link" and values.get("rel") not in ("canonical", "prev", "next"):
            self.loaded.append(values.get("href", ""))
        elif tag == "a":
            self.links.append(values.get("href", ""))


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        outside = [
            target for target in Targets(page.read_text()).loaded if urlsplit(target).scheme in ("http", "https")
        ]
        assert outside == [], page.name


def test_all_links_between_pages_lead_to_a_page_and_a_place_on_it(site: Path) -> None:
    pages = {page: Targets(page.read_text()) for page in site.rglob("*.html") if page.name != "404.html"}
    assert {"index.html", "concepts.html", "faq.html", "api.html", "shards.html"} <= {page.name for page in pages}
    lost = []
    for page, found in pages.items():
        for link in found.links:
            parts = urlsplit(link)
            if parts.scheme or link in ("", "."):
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            anchors = pages[target].anchors if target in pages else {unquote(parts.fragment)}
            if not target.exists() or (parts.fragment and unquote(parts.fragment) not in anchors):
                lost.append(f"{page.name}: {link}")
    assert lost == []


def test_lists_and_tables_are_no_paragraphs(site: Path) -> None:
    for page in site.rglob("*.html"):
        paragraphs = re.findall(r"<p>(.*?)</p>", page.read_text(), re.DOTALL)
        lost = [one[:200] for one in paragraphs if re.search(r"^\s*([-*] |[0-9]+\. |\|)", one, re.MULTILINE)]
        assert lost == [], page.name
    steps = (site / "recipes.html").read_text().partition('id="from-plain-kinetics-weights')[2].partition("</ol>")[0]
    assert steps.count("<li>") == 3
    assert steps.count("<pre>") == 3


def test_every_public_name_is_in_the_reference_with_its_words(site: Path) -> None:
    text = re.sub(r"<[^>]+>", "", (site / "api.html").read_text())
    for name in re2tal.__all__:
        if name != "__version__":
            assert name in text
    assert re2tal.load_detector.__doc__.splitlines()[0].split("`")[0][:30] in text


def test_pictures_of_pages_are_there(site: Path) -> None:
    for page in site.rglob("*.html"):
        for target in Targets(page.read_text()).loaded if page.name != "404.html" else []:  # that may be of any folder
            if target and not urlsplit(target).scheme:
                assert (page.parent / unquote(urlsplit(target).path)).exists(), (page.name, target)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_tables_wider_than_the_page_can_be_scrolled_by_keyboard(site: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 700, "height": 800})
        page.goto((site / "backbones.html").as_uri())
        page.wait_for_function("document.querySelector('[tabindex=\"0\"][role=region]')")
        wide = page.locator(".md-typeset__scrollwrap[role=region]").first
        wide.focus()
        page.keyboard.press("ArrowRight")
        page.wait_for_function("one => one.scrollLeft > 0", arg=wide.element_handle())
        browser.close()
