"""What a picture takes before anything is loaded: bytes of memory by stage, products, and what would fit.

The one place of these estimates: both runtimes ask it before they begin, `sana-edge plan` prints it. It reads
configs, never weights; it imports the store and files of the root only, and no torch.
"""
