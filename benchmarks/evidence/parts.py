"""PARTS: name -> what it shows, how it is measured, and how it is shown."""

from __future__ import annotations

from evidence import costs, end_to_end, peers, recognition, zero
from evidence.cells import Part

PARTS: dict[str, Part] = {
    "recognition": Part("trained networks, rewired", recognition.cells, recognition.show, hours=0.8),
    "features": Part(
        "frozen features against end to end, on the demo", end_to_end.demo_cells, end_to_end.show_demo, hours=1.4
    ),
    "real": Part("the same on real video, UR Fall Detection", end_to_end.urfd_cells, end_to_end.show_urfd, hours=1.25),
    "memory": Part("memory and time", costs.memory_cells, costs.show_memory, hours=0.25, alone=True),
    "resolution": Part(
        "frames and pixels within a memory budget", costs.resolution_cells, costs.show_resolution, hours=0.6
    ),
    "precision": Part(
        "errors by depth and number format", costs.precision_cells, costs.show_precision, hours=0.7, alone=True
    ),
    "zero": Part("memory of a rank, and what ranks cost", zero.cells, zero.show, hours=0.35, alone=True),
    "peers": Part("reference vectors, and other implementations", peers.cells, peers.show, hours=0.2, alone=True),
}
