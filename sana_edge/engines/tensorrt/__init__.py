"""TensorRT's engines: found, trusted, built once, loaded and run through NVIDIA's own bindings.

None of it has run on an NVIDIA GPU; tests use stand-ins with the real bindings' signatures. Imports as
`sana_edge.engines`.
"""
