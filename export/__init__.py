"""From a checkpoint to graphs and engines: ONNX, TensorRT.

Stands above torch_runtime and engines and imports neither calib nor the pipeline; only the command line
imports it.
"""
