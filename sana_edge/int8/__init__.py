"""The mathematics of INT8 (`quant`, once), its layers, and `ops`, their only door to kernels.

A layer here knows shapes and scales, not which network it is in. May be imported: the store, the root's
floor, `sana_edge.kernels`; no network and no runtime.
"""
