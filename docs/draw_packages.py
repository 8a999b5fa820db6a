"""Draws the packages of re2tal and their imports: `python docs/draw_packages.py` writes docs/packages.svg.

Imports are read from the source with `ast`. A package stands one row below the lowest one that imports it, and an
arrow leads down to each that it imports and that none of the others it imports leads to already.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMMON = ("structures", "files", "strict_json", "tables", "options", "distributed")
"""Leaves that nearly all import: drawn at the foot, without arrows."""
WIDTH, HEIGHT, BETWEEN, ROW, MARGIN = 118, 32, 22, 88, 24


def packages(root: Path) -> dict[str, set[str]]:
    """Each package or module directly below `root`, with those that it imports."""
    names = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    names -= {"__init__"}
    found: dict[str, set[str]] = {name: set() for name in names}
    for path in sorted(root.rglob("*.py")):
        package = path.relative_to(root).parts[0].removesuffix(".py")
        if package not in found:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            targets = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if targets == [root.name]:
                targets = [f"{root.name}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            for target in targets:
                top, _, rest = target.partition(".")
                if top == root.name and rest.split(".")[0] in names - {package}:
                    found[package].add(rest.split(".")[0])
    return found


def below(imports: dict[str, set[str]], package: str) -> set[str]:
    """All that `package` leads to, at any depth."""
    return imports[package].union(*(below(imports, one) for one in imports[package]))


def depth(imports: dict[str, set[str]], package: str) -> int:
    """The row of a package, counted from the top."""
    return 1 + max((depth(imports, one) for one in imports if package in imports[one]), default=-1)


def draw(imports: dict[str, set[str]]) -> str:
    """The picture as SVG."""
    shown = {name: found - {*COMMON} for name, found in imports.items() if name not in COMMON}
    rows: dict[int, list[str]] = defaultdict(list)
    for name in sorted(shown):
        rows[depth(shown, name)].append(name)
    widest = max(len(names) for names in rows.values())
    total = 2 * MARGIN + widest * WIDTH + (widest - 1) * BETWEEN
    foot = MARGIN + (max(rows) + 1) * ROW

    place: dict[str, tuple[float, float]] = {}
    for row, names in sorted(rows.items()):
        start = (total - len(names) * WIDTH - (len(names) - 1) * BETWEEN) / 2
        centre = {name: _mean([place[one][0] for one in place if name in shown[one]], total / 2) for name in names}
        for column, name in enumerate(sorted(names, key=lambda name: (centre[name], name))):
            place[name] = (start + column * (WIDTH + BETWEEN) + WIDTH / 2, MARGIN + row * ROW)

    lines = []
    for name in sorted(shown):
        direct = sorted(one for one in shown[name] if all(one not in below(shown, two) for two in shown[name]))
        for one in direct:
            (x, y), (to_x, to_y) = place[name], place[one]
            y, bend = y + HEIGHT, (to_y - y - HEIGHT) / 2
            curve = f"M{x:g} {y:g}C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y - 5:g}"
            lines.append(f'<path d="{curve}" fill="none" stroke="#8a94a6" marker-end="url(#arrow)"/>')
    lines += [_box(name, *place[name], "#eef4ff", "#5b7db1") for name in sorted(shown)]
    start = (total - len(COMMON) * WIDTH - (len(COMMON) - 1) * BETWEEN) / 2 + WIDTH / 2
    common = [name for name in COMMON if name in imports]
    lines += [_box(name, start + i * (WIDTH + BETWEEN), foot, "#f6f6f2", "#9a9a8c") for i, name in enumerate(common)]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{foot + HEIGHT + MARGIN}" '
            'font-family="Helvetica, Arial, sans-serif" font-size="13" text-anchor="middle">',
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" '
            'markerHeight="7" orient="auto">'
            '<path d="M0 0L8 4L0 8z" fill="#8a94a6"/></marker></defs>',
            '<rect width="100%" height="100%" fill="white"/>',
            *lines,
            "</svg>\n",
        ]
    )


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _box(name: str, x: float, y: float, fill: str, edge: str) -> str:
    return (
        f'<rect x="{x - WIDTH / 2:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5" '
        f'fill="{fill}" stroke="{edge}"/>'
        f'<text x="{x:g}" y="{y + HEIGHT / 2 + 4.5:g}">{name}</text>'
    )


if __name__ == "__main__":
    (HERE / "packages.svg").write_text(draw(packages(HERE.parent / "re2tal")))
    print(f"wrote {HERE / 'packages.svg'}")
