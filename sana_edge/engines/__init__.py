"""An exported folder without torch, by onnxruntime, OpenVINO or TensorRT: choice, sessions, networks.

`model` loads it, `memory` says what fits, and `runtime` is what `sana_edge.pipeline` drives. May be imported:
the store's modules without torch and the root's floor; never torch, a network or `export`.
"""
