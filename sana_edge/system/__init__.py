"""What the operating system gives: memory, threads and processes, and files that appear whole or not at all.

Part of the floor that every room stands on: it imports `sana_edge.errors` and no torch.
"""
