"""Who judges sana-tiny's pictures: held-out prompts, a detector of what pictures show, and scores.

`prompts` says what a verdict is; `shapes` is the judge, which has no weights. Imports training's scenes only.
"""
