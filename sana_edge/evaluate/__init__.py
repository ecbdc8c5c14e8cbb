"""``sana-edge evaluate``: prompts drawn by one model or two, and how good and how alike the pictures are.

`prompts` are what is drawn, `pictures` what was, kept in a folder; a file a metric; `paired` the statistics,
`judge` who looks at sana-tiny's pictures. Imports the pipeline, the store, and of training the scenes, which
are sana-tiny's world; never cli. torch only where a metric needs it. benchmarks/ stands on it as well.
"""
