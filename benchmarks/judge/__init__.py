"""Pictures made and judged prompt by prompt; the network of sana-tiny's judge, and the shapes' world.

What a verdict is, scores, statistics, sheets, and the judge of sana-tiny's world are of `sana_edge.evaluate`.
The shapes' world needs no art: prompts, and a judge without weights, for models of `sana_edge.training`.
"""
