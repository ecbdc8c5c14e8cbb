"""Training by recipes, of any model and data; how sana-tiny was made (`art`), and a world of flat shapes.

Stands above nets and torch_runtime, imports neither calib nor export; only its own commands import it.
"""
