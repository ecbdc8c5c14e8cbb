"""The exported graphs beside the torch modules: how far apart they are, and how far they may be.

Runs graphs in onnxruntime; writes nothing.
"""
