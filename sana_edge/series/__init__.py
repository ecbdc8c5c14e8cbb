"""Pictures by the thousand: a file of prompts, a folder of pictures, and a manifest that says what is done.

`entries` reads lines, `wildcards` their templates, `pictures` plans them; `manifest` remembers, `folder` says
what is left, and a `painter` draws it: `draw` on a loaded model, `cluster` on the workers of Ray. A `series`
is all of it for one folder, and `many` makes one of a user's arguments. Belongs above the pipeline; nothing
but the package's own face and the command line imports it. No torch, and Ray only inside of `cluster`'s
functions.
"""
