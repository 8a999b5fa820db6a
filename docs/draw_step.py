"""Draws the bytes alive during a training step: `python docs/draw_step.py` writes docs/memory_of_a_step.svg.

Video Swin-T, 64 frames of 112 x 112, in four forms, on tensors that have shapes and no numbers: what is drawn is the
count that `re2tal plan` and benchmarks/memory.py make, and is the same on every machine.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

FORMS = {"plain": "#c2410c", "checkpoint": "#b45309", "reversible": "#1d4ed8", "in pieces": "#0f766e"}
WIDTH, HEIGHT, LEFT, TOP, FOOT = 980, 400, 70, 34, 46
POINTS = 240
"""Of a curve: the most bytes within each of so many equal shares of the step."""


def curves() -> dict[str, list[float]]:
    """By form, MiB alive after each operation of a step."""
    import torch
    from forms import Case, Network

    from re2tal.reversible.live_bytes import LiveBytes

    class Recorder(LiveBytes):
        """Notes the bytes alive after each operation."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = super().__torch_dispatch__(func, types, args, kwargs)
            self.curve.append(self.live / 2**20)
            return result

        curve: list[float]

    network = Network("swin3d_tiny", device=torch.device("cpu"), predicted=True)
    found = {}
    for form in FORMS:
        step = network.step(form, Case(64, 112, 24, known=(0, 1, 6, 2)))
        assert step is not None
        with network.mode:
            step()  # tables that a network makes once stay
            recorder = Recorder()
            recorder.curve = []
            with recorder:
                step()
        found[form] = recorder.curve
    return found


def draw(found: dict[str, list[float]]) -> str:
    """The picture as SVG."""
    most = max(max(curve) for curve in found.values())
    across, down = WIDTH - LEFT - 20, HEIGHT - TOP - FOOT
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="Helvetica, Arial, '
        'sans-serif" font-size="15">',
        "<title>Bytes alive during one training step of Video Swin-T</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for mebibytes in range(0, int(most) + 1, 200):
        y = TOP + down * (1 - mebibytes / most)
        lines.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 20}" stroke="#e2e8f0"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y + 5:.1f}" text-anchor="end" fill="#334155">{mebibytes}</text>')
    for number, (form, curve) in enumerate(found.items()):
        size = len(curve) / POINTS
        shares = [max(curve[int(i * size) : max(int((i + 1) * size), int(i * size) + 1)]) for i in range(POINTS)]
        points = " ".join(
            f"{LEFT + across * i / (POINTS - 1):.1f},{TOP + down * (1 - value / most):.1f}"
            for i, value in enumerate(shares)
        )
        lines.append(f'<polyline points="{points}" fill="none" stroke="{FORMS[form]}" stroke-width="2.5"/>')
        name = f"{form}: {max(curve):.0f} MiB"
        lines.append(f'<text x="{LEFT + 16 + 215 * number}" y="22" fill="{FORMS[form]}">{name}</text>')
    foot = "share of the step's operations: forward, then backward"
    lines.append(
        f'<text x="{LEFT + across / 2:.0f}" y="{HEIGHT - 14}" text-anchor="middle" fill="#334155">{foot}</text>'
    )
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    (HERE / "memory_of_a_step.svg").write_text(draw(curves()))
