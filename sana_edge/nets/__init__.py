"""SANA's networks in torch: denoiser, autoencoder, text encoder, and how they become INT8.

Module names follow diffusers', so that state dicts load. May be imported: `int8`, the store and the root's
floor; nothing that draws a picture.
"""
