"""Noise: how much of it each step of a picture leaves, and a seed's own with other seeds' mixed in.

Belongs to the root's floor, as `sana_edge.sampler` does: no torch, and any room may import it.
"""
