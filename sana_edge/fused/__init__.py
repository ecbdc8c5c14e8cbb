"""The GPU path: networks whose INT8 layers run as fused operations, and which backend computes them.

`ops` is the only door to the fused kernels. May be imported: `nets`, `int8`, the store and the root's floor.
"""
