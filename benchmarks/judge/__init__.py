"""Who judges pictures: held-out prompts, detectors of what pictures show, scores, and contact sheets.

`prompts` says what a verdict is. Two worlds have prompts and a judge of their own, `shapes` and `art`.
"""
