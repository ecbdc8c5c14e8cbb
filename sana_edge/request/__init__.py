"""What a caller asks for, checked before anything heavy is loaded or run.

A `request` has the arguments of one generation, within `bounds`; with a model it becomes a `plan`, in which
nothing is open. `loading` says how a model is loaded. Belongs to the root's floor: no torch.
"""
