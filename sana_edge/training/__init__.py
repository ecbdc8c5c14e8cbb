"""Training by recipes, of any model and data, and how sana-tiny was made.

Stands above nets and torch_runtime, imports neither calib nor export; only its own commands import it.
"""
