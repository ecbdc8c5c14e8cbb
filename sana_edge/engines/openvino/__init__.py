"""OpenVINO's engines: on every CPU, and on Intel's GPUs and NPUs. Imports as `sana_edge.engines`."""
