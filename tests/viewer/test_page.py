"""The page in a browser: Chromium without a window, driven by playwright; skipped where either is missing."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from re2tal.data.building.annotations import read_annotations
from re2tal.runs.viewing import ViewOptions, open_viewer

playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser; pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

NASTY = '"><img src=x onerror=window.broken=1><script>window.broken=1</script>'


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


def write_video(path: Path, *, num_frames: int = 50) -> None:
    """Five seconds of grey that grows lighter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(num_frames):
            picture = np.full((48, 64, 3), 4 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_inputs(folder: Path, *, num_videos: int = 3) -> None:
    """Video k has one right prediction, two wrong ones and a truth; file 0 is there, one id and a class are nasty."""
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "v0.mp4")
    found = [([1, 3], "run", 0.9), ([4, 5], NASTY, 0.5), ([0, 0.5], "run", 0.1)]
    rows = [{"segment": segment, "label": label, "score": score} for segment, label, score in found]
    ids = ["v0", NASTY, *(f"v{number}" for number in range(2, num_videos))]
    (folder / "results.json").write_text(json.dumps({"results": dict.fromkeys(ids, rows)}))
    truth = [{"segment": [1, 3], "label": "run"}]
    entries = {one: {"subset": "training", "duration": 5.0, "annotations": truth} for one in ids if one != NASTY}
    (folder / "annotations.json").write_text(json.dumps({"database": entries}))


class Visit:
    """One page, the requests it made and the errors it had."""

    def __init__(self, browser: Any, address: str, **context: Any) -> None:
        self.page = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context)).new_page()
        self.page.set_default_timeout(30_000)
        self.problems: list[str] = []
        self.requests: list[str] = []
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", lambda said: self.problems.append(said.text) if said.type == "error" else None)
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(address)
        self.page.wait_for_selector(".bar")

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def shows(self, selector: str, text: str) -> None:
        """Wait until the element holds the text."""
        self.page.wait_for_function(
            "([selector, text]) => document.querySelector(selector)?.textContent.includes(text)", arg=[selector, text]
        )


class Served:
    """A viewer's address, for as long as the test runs."""

    def __init__(self, folder: Path, *, truth: bool = True, videos: bool = True, save_to: Path | None = None) -> None:
        options = ViewOptions(
            save_to=save_to,
            annotations=folder / "annotations.json" if truth else None,
            videos=folder / "videos" if videos else None,
            port=0,
        )
        self.server = open_viewer(folder / "results.json", options)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> str:
        return self.server.address

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def saved(folder: Path, video_id: str = "v0") -> list[tuple[float, float, str]]:
    records = read_annotations(folder / "annotations.corrected.json").subset("training")
    (actions,) = [one.actions for one in records if one.video_id == video_id]
    return [(one.start_seconds, one.end_seconds, one.label) for one in actions]


def test_actions_are_dragged_accepted_added_undone_and_saved(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path) as address:
        visit = Visit(browser, address)
        page = visit.page
        visit.shows("#legend", "missed")
        page.click(".bar.truth")
        handle, axis = page.locator(".handle.end").bounding_box(), page.locator("#inner").bounding_box()
        page.mouse.move(handle["x"] + 4, handle["y"] + 6)
        page.mouse.down()
        page.mouse.move(handle["x"] + 4 + axis["width"] / 5, handle["y"] + 6, steps=4)
        page.mouse.up()
        visit.shows("#chosen", "1.00 to 4.0")
        page.click(".bar.prediction[aria-label*='4.00 to 5.00']")
        visit.press("a")
        visit.shows("#status", "1 accepted as truth")
        page.fill("#label", "new class")
        visit.press("Enter")
        visit.shows("#chosen", "new class")
        visit.press("i")
        page.keyboard.type("run")
        visit.press("Enter", "Control+z", "Control+z")  # the label, then the action
        visit.shows("#status", "Undone")
        visit.shows("#save", "Save (1)")
        visit.press("Control+s")
        visit.shows("#status", "Saved 1 corrected video to")
        assert page.inner_text("#save") == "Save"
        assert visit.problems == []
        assert all(url.startswith((address, "data:,")) for url in visit.requests)
    first, second = saved(tmp_path)
    assert first == (1.0, pytest.approx(4.0, abs=0.05), "run")
    assert second == (4.0, 5.0, "new class")


def test_names_are_text_and_never_markup(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path) as address:
        visit = Visit(browser, address)
        visit.press("ArrowDown")
        visit.shows("#name", NASTY)
        visit.shows(".row-name:nth-of-type(1)", "run")
        assert NASTY in [one.strip() for one in visit.page.locator(".row-name").all_inner_texts()]
        assert NASTY in visit.page.locator(".video b").all_inner_texts()
        visit.page.click(".bar.prediction >> nth=-1")
        visit.page.reload()  # comes back to the same video
        visit.shows("#name", NASTY)
        assert visit.page.evaluate("window.broken") is None
        assert visit.page.evaluate("document.querySelectorAll('img, main script').length") == 0
        assert visit.problems == []


def test_the_video_plays_seeks_and_loops_and_a_clock_stands_in_for_it(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path) as address:
        page = Visit(browser, address).page
        page.wait_for_function("() => document.getElementById('video').readyState >= 2")
        page.click(".bar.truth")
        page.wait_for_function("() => Math.abs(document.getElementById('video').currentTime - 1) < 0.05")
        page.keyboard.press("ArrowDown")
        page.wait_for_selector("#no-video:not([hidden])")
        page.click(".bar.prediction >> nth=0")
        assert page.inner_text("#clock") == "1.00 s"
        page.select_option("#speed", "4")
        page.click("#loop")
        times = page.evaluate(
            """async () => {
              const times = [];
              for (let count = 0; count < 60; count++) {
                await new Promise(requestAnimationFrame);
                times.push(parseFloat(document.getElementById("clock").textContent));
              }
              return times;
            }"""
        )
        assert min(times) >= 1.0
        assert max(times) <= 3.2
        assert any(later < earlier for earlier, later in pairwise(times))


def test_the_next_error_is_found_in_the_next_video_and_filters_hide(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path) as address:
        visit = Visit(browser, address)
        visit.press("e")
        visit.shows("#chosen", "score 0.10, background")
        visit.press("e")
        visit.shows("#chosen", "score 0.50, background")
        visit.press("e")  # the second video has no annotations, so no errors
        visit.shows("#name", "v2")
        visit.page.locator("#score-filter").fill("0.4")
        visit.shows("#shown-too", "2 of 3 predictions")
        visit.page.select_option("#class-filter", "run")
        visit.shows("#shown-too", "1 of 3 predictions")
        visit.page.select_option("#type-filter", "wrong label")
        visit.shows("#found", "1 of 3 videos")  # the one without annotations may hold anything


def test_the_next_error_is_found_among_corrections_that_are_not_saved(browser: Any, tmp_path: Path) -> None:
    """The list knows the errors of what is saved, and there no true action is missed."""
    write_inputs(tmp_path)
    with Served(tmp_path) as address:
        visit = Visit(browser, address)
        visit.shows("#legend", "missed")
        visit.press(*4 * ["ArrowRight"], "i")
        visit.page.keyboard.type("run")
        visit.press("Enter")
        visit.shows("#save", "Save (1)")
        visit.press("ArrowDown")
        visit.shows("#name", NASTY)
        visit.press("ArrowDown")
        visit.shows("#name", "v2")
        visit.page.select_option("#type-filter", "missed")
        visit.page.click("#next-error")
        visit.shows("#chosen", "4.00 to")
        assert visit.page.inner_text("#name") == "v0"
        assert visit.problems == []


def test_two_pages_merge_what_both_corrected(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path) as address, Served(tmp_path) as other:
        one, two = Visit(browser, address), Visit(browser, other)
        one.page.click(".bar.truth")
        one.press("Delete", "Control+s")
        one.shows("#status", "Saved 1")
        two.page.click(".bar.prediction[aria-label*='4.00 to 5.00']")
        two.press("a", "Control+s")
        two.shows("#conflict-text", "Both changed v0")
        two.page.click("#merge")
        two.shows("#status", "Saved 1")
        assert two.page.locator(".bar.truth").count() == 1
    assert saved(tmp_path) == [(4.0, 5.0, NASTY)]


def test_what_is_being_typed_stays_when_types_come(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path) as address:
        visit, held = Visit(browser, address), []
        visit.page.route("**/api/types", lambda route: held.append(route))
        visit.page.click(".bar.prediction[aria-label*='4.00 to 5.00']")
        visit.press("a")
        visit.page.fill("#label", "walk")
        held[0].continue_()
        visit.page.wait_for_selector(".bar.prediction.right[aria-label*='4.00 to 5.00']")
        assert visit.page.input_value("#label") == "walk"
        visit.press("Enter")
        visit.shows("#chosen", "walk")
        # What cannot be is put back.
        visit.page.fill("#end", "99")
        visit.press("Enter")
        visit.shows("#status", "between 0 and 5.00 s")
        assert visit.page.input_value("#end") == "5.00"


def test_where_nothing_can_be_saved_the_corrections_can_be_downloaded(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path, save_to=tmp_path / "later" / "a.json") as address:
        (tmp_path / "later").write_text("in the place of the folder")
        visit = Visit(browser, address)
        visit.page.click(".bar.truth")
        visit.press("Delete", "Control+s")
        visit.shows("#status", "Download keeps your corrections")
        visit.shows("#save", "Save (1)")
        with visit.page.expect_download() as download:
            visit.page.click("#download")
    document = json.loads(Path(download.value.path()).read_text())
    assert [len(document["database"][one]["annotations"]) for one in ("v0", "v2")] == [0, 1]


def test_a_change_on_the_disk_is_told(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path) as address:
        visit = Visit(browser, address)
        document = json.loads((tmp_path / "annotations.json").read_text())
        document["database"]["v0"]["annotations"] = []
        (tmp_path / "annotations.json").write_text(json.dumps(document))
        visit.page.evaluate("window.dispatchEvent(new Event('focus'))")
        visit.shows("#status", "this is the new state")
        assert visit.page.locator(".bar.truth").count() == 0


def test_the_video_is_in_sight_at_every_width(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path) as address:
        page = Visit(browser, address).page
        for width in (390, 900, 1400):
            page.set_viewport_size({"width": width, "height": 800})
            box = page.locator("#screen").bounding_box()
            assert box["height"] > 150
            assert 0 <= box["y"] < 300
            assert page.evaluate("document.documentElement.scrollWidth") == width


def write_odd_inputs(folder: Path) -> None:
    """Actions of no length, of a long name and of a Hebrew one; times that are those of a calendar; two minutes."""
    found = {
        "v0": [([5, 5], "run", 0.9), ([5, 8], "run", 0.8), ([8, 8.01], "run", 0.7), ([8.01, 130], "run", 0.6)],
        "calendar": [([1.7e9, 1.7e9 + 5], "long name " * 19, 0.9)],
        "hebrew": [([1, 2], "\u05e9\u05dc", 0.9)],
    }
    results = {
        one: [{"segment": segment, "label": label, "score": score} for segment, label, score in rows]
        for one, rows in found.items()
    }
    (folder / "results.json").write_text(json.dumps({"results": results}))


def test_odd_times_and_names_are_shown_as_they_are(browser: Any, tmp_path: Path) -> None:
    write_odd_inputs(tmp_path)
    with Served(tmp_path, truth=False, videos=False) as address:
        visit = Visit(browser, address, viewport={"width": 390, "height": 800})
        page = visit.page
        boxes = [bar.bounding_box() for bar in page.locator(".bar").all()]
        for number, one in enumerate(boxes):
            for other in boxes[:number]:
                beside = other["x"] + other["width"] <= one["x"] + 0.1 or one["x"] + one["width"] <= other["x"] + 0.1
                assert beside or one["y"] != other["y"], "no bar covers another"
        assert page.evaluate("document.querySelector('main').scrollWidth") == 390
        page.evaluate("for (let n = 0; n < 12; n++) document.getElementById('zoom-in').click()")
        visit.shows(".tick:nth-child(2)", "0:00.5")
        visit.press("ArrowDown")
        visit.shows("#name", "calendar")
        page.wait_for_selector(".bar[aria-label*='1700000005.00 s']", state="attached")
        assert 2 <= page.locator(".tick").count() < 50
        visit.press("ArrowDown")
        page.wait_for_selector(".bar[aria-label^='prediction: \u2068\u05e9\u05dc\u2069, 1.00 to 2.00 s']")
        assert visit.problems == []


def test_the_clock_of_a_long_video_says_what_the_axis_says(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    annotations = json.loads((tmp_path / "annotations.json").read_text())
    annotations["database"]["v2"]["duration"] = 300.0
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    with Served(tmp_path, videos=False) as address:
        visit = Visit(browser, address)
        visit.shows("#clock", "0.00 s")
        visit.press("ArrowDown")
        visit.shows("#name", NASTY)
        visit.press("ArrowDown")
        visit.shows("#name", "v2")
        visit.press(*15 * ["Shift+ArrowRight"])
        visit.shows("#clock", "75.00 s (1:15)")


def test_a_phone_without_truth_and_videos_shows_the_axis(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    with Served(tmp_path, truth=False, videos=False) as address:
        visit = Visit(browser, address, viewport={"width": 390, "height": 800}, has_touch=True, color_scheme="dark")
        page = visit.page
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        visit.shows("#notes", "--annotations FILE adds them")
        assert page.is_visible("#locked")
        assert page.is_disabled("#next-error")
        assert page.locator("#accept-shown").is_disabled()
        assert not page.locator("#sidebar").is_visible()
        page.tap("#menu")
        page.tap(".video >> nth=2")
        visit.shows("#name", "v2")
        assert not page.locator("#sidebar").is_visible()
        assert visit.problems == []


def test_a_long_list_draws_only_what_is_in_sight(browser: Any, tmp_path: Path) -> None:
    write_inputs(tmp_path, num_videos=1000)
    with Served(tmp_path) as address:
        page = Visit(browser, address).page
        assert page.locator(".video").count() < 60
        page.evaluate("document.getElementById('list').scrollTop = 1e9")
        page.wait_for_selector("text=v999")
        assert page.locator(".video").count() < 60
