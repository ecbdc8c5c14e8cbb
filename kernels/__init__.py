"""Kernels behind sana_edge.ops, one operation per file; reference.py is the specification of all of them."""
