"""From a checkpoint to a quantized package: observe, smooth, clip, judge each layer, write, report.

Stands above `torch_runtime`; only the command line imports it.
"""
