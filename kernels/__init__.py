"""Kernels behind `sana_edge.int8.ops`, one operation a file; reference.py is the specification of all.

Imports errors and the mathematics of quantization only; `sana_edge.int8.ops` and `sana_edge.fused.ops` are
its doors.
"""
