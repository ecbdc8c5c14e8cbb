"""From a checkpoint to graphs and engines: ONNX, TensorRT."""
