"""The page of `re2tal view` with many videos and detections, in Chromium without a window.

    python benchmarks/view_page.py [--quick] [--axe axe.min.js] --json FILE

Keys: usable_s (from opening the address until the first video's list answers a key press; the median of several
openings), start_s (the command's own work before that: reading, matching, listening), longest_task_ms (the longest time
in which the page answers nothing, while the list of videos and a list of detections are scrolled from end to end),
serious (violations that axe-core calls serious or critical, light and dark; only with --axe). Claims: usable in 2 s,
no task above 200 ms while scrolling, nothing serious. `--quick`: 50 videos and 5,000 detections.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from re2tal.runs.viewing import ViewOptions, open_viewer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OPENINGS = 5
WATCH_TASKS = """
window.longest = 0;
new PerformanceObserver(list => {
  for (const task of list.getEntries()) window.longest = Math.max(window.longest, task.duration);
}).observe({type: "longtask"});
"""
SCROLL = """async () => {
  const areas = [...document.querySelectorAll("*")].filter(one => one.scrollHeight > one.clientHeight + 20 &&
    ["auto", "scroll"].includes(getComputedStyle(one).overflowY));
  for (const area of areas)
    for (let step = 0; step <= 100; step++) {
      area.scrollTop = area.scrollHeight * step / 100;
      await new Promise(requestAnimationFrame);
    }
  return areas.map(one => one.id || one.className || one.tagName);
}"""
BUSY = "() => { const until = performance.now() + 120; while (performance.now() < until); }"
SERIOUS = """async () => (await axe.run()).violations
  .filter(one => ["serious", "critical"].includes(one.impact)).map(one => one.id)"""


def write_inputs(folder: Path, *, num_videos: int, num_detections: int) -> None:
    """Videos of ten minutes in 20 classes, 10 true actions each; the same every time."""
    draw = random.Random(0)

    def actions(count: int) -> list[dict[str, Any]]:
        starts = [draw.uniform(0, 580) for _ in range(count)]
        return [
            {
                "segment": [start, start + draw.uniform(0.5, 20)],
                "label": f"class {draw.randrange(20)}",
                "score": draw.random(),
            }
            for start in starts
        ]

    ids = [f"video_{number:04d}" for number in range(num_videos)]
    results = {one: actions(num_detections // num_videos) for one in ids}
    (folder / "results.json").write_text(json.dumps({"results": results}))
    truth = {one: {"subset": "validation", "duration": 600.0, "annotations": actions(10)} for one in ids}
    for entry in truth.values():
        for action in entry["annotations"]:
            del action["score"]
    (folder / "annotations.json").write_text(json.dumps({"database": truth}))


def measure(folder: Path, *, axe: Path | None) -> dict[str, Any]:
    began = time.perf_counter()
    server = open_viewer(folder / "results.json", ViewOptions(annotations=folder / "annotations.json", port=0))
    figures: dict[str, Any] = {"start_s": time.perf_counter() - began}
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        figures["usable_s"] = statistics.median(usable(browser, server.address) for _ in range(OPENINGS))
        figures["longest_task_ms"] = longest_task(browser, server.address)
        if axe is not None:
            figures["serious"] = serious(browser, server.address, axe)
        browser.close()
    server.shutdown()
    server.server_close()
    return figures


def usable(browser: Any, address: str) -> float:
    """Seconds until the page shows the first video and has answered a key."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    began = time.perf_counter()
    page.goto(address)
    page.wait_for_selector(".bar")
    page.keyboard.press("ArrowDown")
    page.evaluate("() => new Promise(requestAnimationFrame)")
    seconds = time.perf_counter() - began
    page.close()
    return seconds


def longest_task(browser: Any, address: str) -> float:
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.goto(address)
    page.wait_for_selector(".bar")
    page.evaluate(WATCH_TASKS)
    scrolled = page.evaluate(SCROLL)
    longest = float(page.evaluate("window.longest"))
    page.evaluate(f"setTimeout({BUSY})")
    page.wait_for_function("() => window.longest >= 100")  # the watch sees a task that is long
    page.close()
    if not scrolled:
        raise RuntimeError("nothing on the page scrolls, so no time of it says anything")
    return longest


def serious(browser: Any, address: str, axe: Path) -> list[str]:
    found = []
    for scheme in ("light", "dark"):
        page = browser.new_context(color_scheme=scheme, bypass_csp=True).new_page()
        page.goto(address)
        page.wait_for_selector(".bar")
        page.evaluate(axe.read_text())
        found += [f"{scheme}: {name}" for name in page.evaluate(SERIOUS)]
        page.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--quick", action="store_true", help="50 videos and 5,000 detections")
    parser.add_argument("--axe", type=Path, help="axe-core's axe.min.js, to look for faults of accessibility")
    options = parser.parse_args()
    if CHROMIUM is None:
        sys.exit("chromium is not installed; install it, for example: apt-get install chromium")
    shrink = 10 if options.quick else 1
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), num_videos=500 // shrink, num_detections=50_000 // shrink)
        figures = measure(Path(folder), axe=options.axe)
    for name, value in figures.items():
        print(f"{name:<18} {value if isinstance(value, list) else f'{value:.3g}'}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
