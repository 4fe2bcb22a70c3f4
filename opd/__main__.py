"""``python -m opd``: what ``python train.py`` is in a checkout; for torchrun ``torchrun ... -m opd``."""

from opd.cli import main

raise SystemExit(main())
