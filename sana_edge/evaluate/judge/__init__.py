"""Who judges sana-tiny's pictures: held-out prompts, a detector of what pictures show, and scores.

`prompts` says what a verdict is, `scene_prompts` what is asked for; `detector` is the judge, with weights of
its own. Imports training's scenes only.
"""
