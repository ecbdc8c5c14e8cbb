"""Launchers of the CUDA library of csrc/, loaded with ctypes; imports errors and the references only."""
