"""``python -m sana_edge`` is the ``sana-edge`` command."""

from __future__ import annotations

import sys

from sana_edge.cli.main import main

sys.exit(main())
