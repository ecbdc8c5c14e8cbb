"""The steps of `gpu_check.py` that are not commands by themselves; `steps` lists all with their limits.

Each is a function of a `Setting` that writes what it found as it goes. None needs more than torch.
"""
