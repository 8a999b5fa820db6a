"""One HTML file to look at: the mAP table, the curves and a timeline per video, pictures included.

Labels and ids come from data and are escaped; the content security policy allows this page's own style and embedded
pictures, and nothing else: no script, no font, no address is ever fetched.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from re2tal.files import write_atomically

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem }
h1, dd, figcaption { overflow-wrap: anywhere }
h2 { font-size: 1.2rem; margin-top: 2.5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .75rem; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; min-width: 8rem }
tr.sum td { font-weight: bold; border-top: 2px solid #222 }
figure { margin: 1.5rem 0; overflow-x: auto }
img { max-width: 100%; min-width: 48rem; height: auto; border: 1px solid #eee }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem }
dt { color: #666 }
dd { margin: 0 }
@media print {
  figure, tr { break-inside: avoid }
  h2 { break-after: avoid }
  img { min-width: 0 }
  .wide { overflow: visible; font-size: .65rem }
  th, td { padding: .15rem .3rem }
}
"""


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG and the words that stand for it."""

    caption: str
    png: bytes


def write_page(
    path: Path | str,
    *,
    title: str,
    facts: Mapping[str, str],
    table: Sequence[Sequence[str]],
    protocol: str,
    curves: Picture | None,
    timelines: Sequence[Picture],
) -> None:
    """Write the page to `path`, atomically. `table` has a header row, and a last row that sums up; it may be empty.

    `protocol` says by which rules its numbers were counted.
    """
    rows = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    sections = [f"<h1>{escape(title)}</h1>", f"<dl>\n{rows}\n</dl>"]
    if table:
        sections += [f"<h2>Average precision, %, by tIoU; protocol {escape(protocol)}</h2>", _table(table)]
    if curves is not None:
        sections += ["<h2>Training</h2>", _figure(curves)]
    if timelines:
        sections += [f"<h2>Videos ({len(timelines)})</h2>", *map(_figure, timelines)]
    style_hash = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; base-uri 'none'; form-action 'none'"
    body = "\n".join(sections)
    write_atomically(
        path,
        f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body><main>
{body}
</main></body>
</html>
""",
    )


def _table(table: Sequence[Sequence[str]]) -> str:
    header, *body, last = table
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in (*body, last)]
    rows = "\n".join([*(f"<tr>{line}</tr>" for line in lines[:-1]), f'<tr class="sum">{lines[-1]}</tr>'])
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _figure(picture: Picture) -> str:
    caption = escape(picture.caption)
    data = base64.b64encode(picture.png).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}"><figcaption>{caption}</figcaption></figure>'
    )
