"""Pictures made and judged prompt by prompt, and the art's world: its prompts, and its judge with weights.

What a verdict is, scores, statistics and sheets are of `sana_edge.evaluate`, with the judge of the shapes.
"""
