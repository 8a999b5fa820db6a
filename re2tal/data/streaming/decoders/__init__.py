"""Decoders: each takes a small mp4 in memory and gives frames by number, the same pictures whichever is used."""
