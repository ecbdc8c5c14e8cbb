"""A server and a sidecar: one queue of jobs, and thin faces that put into it and read from it.

`job`, `queue` and `worker` draw; `openai`, `automatic1111` and `jobs` are the faces of HTTP, which `app` puts
together behind `guard`; `stdio` is the one of JSON lines. Only the faces of HTTP need the extra ``serve``.
Belongs above the pipeline; only the command line imports it.
"""
