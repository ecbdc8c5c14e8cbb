"""`sana-edge bench`: float against INT8 on each backend that runs here, and what benchmarks share with it.

Each contender draws in a process of its own (`worker`), in turns; the orchestration imports no torch, only
`shapes` and `random_model`, which write models to measure with, do. It may import the pipeline, whole models'
makers (calib, export) and the store, never `cli`; `cli` alone imports it.
"""
