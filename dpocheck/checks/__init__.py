"""The catalogue, chapter by chapter.  Importing this package declares every check."""

from __future__ import annotations

import importlib

CHAPTERS = ("rows", "logps", "reference", "loss", "logz", "gradient", "step", "metrics", "options")

for chapter in CHAPTERS:
    importlib.import_module(f"dpocheck.checks.{chapter}")
