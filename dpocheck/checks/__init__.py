"""The catalogue, chapter by chapter.  Importing this package declares every check."""

from __future__ import annotations

import importlib

CHAPTERS = (
    "rows", "logps", "reference", "loss", "logz", "gradient", "step", "metrics", "options", "optimum", "runs", "lora",
    "ranks", "defaults", "tokenizer",
)  # fmt: skip

FILES = (*CHAPTERS, "divergence", "sft", "optimizer", "agreement")  # four of the chapters `loss` and `step`

for file in FILES:
    importlib.import_module(f"dpocheck.checks.{file}")
