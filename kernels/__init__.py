"""Kernels behind `sana_edge.int8.ops`, one operation a file; reference.py is the specification of all."""
