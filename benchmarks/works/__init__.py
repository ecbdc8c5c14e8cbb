"""What is timed: implementations of the same work, ours beside others', in full size with random weights.

To add an implementation, give it an entry in the ``loaders`` of the works that it can do.
"""
