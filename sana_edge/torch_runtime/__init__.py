"""A model folder on a torch device: loading, denoising steps, recorded CUDA graphs, decoding in tiles.

`loader` reads the networks, `model` holds them and `memory` what they take; `runtime` is what
`sana_edge.pipeline` drives. May be imported: `fused` and all below it; no engine.
"""
