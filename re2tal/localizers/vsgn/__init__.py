"""VSGN: graph network, anchors, loss and decoding."""
