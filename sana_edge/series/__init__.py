"""Pictures by the thousand: a file of prompts, a folder of pictures, and a manifest that says what is done.

`entries` reads lines, `wildcards` their templates, `pictures` plans them; `manifest` remembers, `draw` makes
them on a loaded model, `cluster` on the workers of Ray, and `many` puts it together. Belongs above the
pipeline; nothing but the package's own face and the command line imports it. No torch, and Ray only inside of
`cluster`'s functions.
"""
