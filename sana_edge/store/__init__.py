"""What lies on disk or on the hub: models by name, downloads, weights, packages, exported folders.

Everything is looked at and checked here before anything is computed from it. Nothing of a network, an
engine or a kernel may be imported; only modules that read tensors may import torch.
"""
