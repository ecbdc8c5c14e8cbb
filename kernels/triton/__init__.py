"""Triton's kernels, a file for each operation of `sana_edge.kernels.reference` and one for its kernels.

Imports errors and the mathematics of `sana_edge.int8.quant` only; Triton where a kernel is launched.
"""
