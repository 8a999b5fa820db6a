"""PARTS: name -> what it shows, how it is measured, and how it is shown."""

from __future__ import annotations

from evidence import costs, end_to_end, peers, recognition, zero
from evidence.cells import Part

PARTS: dict[str, Part] = {
    "recognition": Part("trained networks, rewired", recognition.cells, recognition.show),
    "features": Part("frozen features against end to end, on the demo", end_to_end.demo_cells, end_to_end.show_demo),
    "real": Part("the same on real video, UR Fall Detection", end_to_end.urfd_cells, end_to_end.show_urfd),
    "memory": Part("memory and time", costs.memory_cells, costs.show_memory, alone=True),
    "resolution": Part("frames and pixels within a memory budget", costs.resolution_cells, costs.show_resolution),
    "precision": Part("errors by depth and number format", costs.precision_cells, costs.show_precision, alone=True),
    "zero": Part("memory of a rank, and what ranks cost", zero.cells, zero.show, alone=True),
    "peers": Part("reference vectors, and other implementations", peers.cells, peers.show, alone=True),
}
