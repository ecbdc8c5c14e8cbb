"""ONNX graphs of SANA's networks, node by node from the torch modules; knows nothing of files or engines."""
