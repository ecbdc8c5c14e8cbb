"""The ``sana-edge`` command, one file a subcommand: options, progress, exit codes; the work is the library's.

May import everything; nothing imports it. What is heavy is imported by the command that needs it.
"""
