"""The page: complete in one file, and nothing in the data becomes markup."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from re2tal.reporting.fonts import to_png
from re2tal.reporting.page import Picture, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
NASTY = '"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'


class Elements(HTMLParser):
    """Tags with their attributes, and text, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page(folder: Path, name: str = "plain") -> str:
    png = to_png(Figure(figsize=(1, 1)))
    write_page(
        folder / "index.html",
        title=name,
        facts={name: name},
        table=[("class", "0.5"), (name, "12.00"), ("mAP", "12.00")],
        protocol="official",
        curves=Picture("Loss", png),
        timelines=[Picture(name, png), Picture("second", png)],
    )
    return (folder / "index.html").read_text("utf-8")


def test_it_shows_the_table_the_curves_and_the_timelines(tmp_path: Path) -> None:
    elements = Elements(page(tmp_path))
    assert len(elements.named("img")) == 3
    assert len(elements.named("tr")) == 3
    assert {"plain", "12.00", "mAP", "Average precision, %, by tIoU; protocol official", "Videos (2)", "second"} <= set(
        elements.texts
    )
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]


def test_pictures_are_inside_the_page(tmp_path: Path) -> None:
    for image in Elements(page(tmp_path)).named("img"):
        source = image["src"]
        assert source is not None
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")


def test_names_from_data_never_become_markup(tmp_path: Path) -> None:
    clean, nasty = Elements(page(tmp_path)), Elements(page(tmp_path, NASTY))
    assert [tag for tag, _ in nasty.tags] == [tag for tag, _ in clean.tags]
    assert "<script" not in page(tmp_path, NASTY)
    assert nasty.texts.count(NASTY) == clean.texts.count("plain") >= 4
    assert not [name for _, attributes in nasty.tags for name in attributes if name.startswith("on")]
    assert nasty.named("img")[1]["alt"] == NASTY


def test_the_policy_allows_this_style_and_embedded_pictures_and_nothing_else(tmp_path: Path) -> None:
    text = page(tmp_path)
    (policy,) = [
        meta["content"] for meta in Elements(text).named("meta") if meta.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)
    assert style is not None
    digest = base64.b64encode(hashlib.sha256(style.group(1).encode()).digest()).decode()
    assert policy.split("; ") == [
        "default-src 'none'",
        "img-src data:",
        f"style-src 'sha256-{digest}'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert "http:" not in text
    assert "https:" not in text


def test_a_page_without_table_curves_and_videos_is_a_page(tmp_path: Path) -> None:
    write_page(tmp_path / "index.html", title="t", facts={}, table=[], protocol="", curves=None, timelines=[])
    elements = Elements((tmp_path / "index.html").read_text())
    assert not elements.named("img")
    assert not elements.named("table")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_on_a_phone_names_wrap_and_pictures_stay_large_enough_to_read(tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    long, png = "W" * 200, to_png(Figure(figsize=(11, 3), dpi=110))
    pictures = [Picture(long, png)]
    write_page(tmp_path / "index.html", title=long, facts={}, table=[], protocol="", curves=None, timelines=pictures)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": 390, "height": 800})
        shown.set_default_timeout(60_000)
        shown.goto((tmp_path / "index.html").as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") == 390
        assert shown.evaluate("document.querySelector('img').width") >= 700
        browser.close()
