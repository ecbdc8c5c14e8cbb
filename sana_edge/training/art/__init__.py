"""The world of sana-tiny: scenes composed from the Fluent 3D emoji (MIT), their captions and their split.

Stands on the rest of training, which imports nothing of it.
"""
