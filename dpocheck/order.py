"""In which order are checks judged, and which failure makes which other one superfluous?

A bug shows in nearly every whole run.  What is plainest is therefore judged first: log-probs, loss, reference, gradient
and one step of a run, on ordinary batches.  Where one of these fails, all else is made of what failed, and is blocked.
Where they pass, a failure belongs to what is special in its scene, and blocks the scenes that share it.
"""

from __future__ import annotations

from collections.abc import Iterable

from dpocheck.check import CHAPTERS, STAGES, Check
from dpocheck.oracle.theory import PAPER

BASIC = frozenset({"plain", "ragged", "logps"})  # families of scenes that all others are made of
CONTROLS = ("RUN-GRADIENT", "STEP-TWO")  # whole runs without anything special
WHOLE = ("LOSS-SFT",)  # judged by whole runs though it is about the loss
LAST = ("ranks", "options", "defaults")  # chapters that are about what comes on top of a trainer that is right

# Family -> the families that it is made of, beside the basic ones.
MADE_OF: dict[str, tuple[str, ...]] = {
    "evaluation": ("metrics",), "held out": ("metrics", "evaluation"), "pad is eos": ("padding",),
    "ranks": ("accumulation", "clip", "metrics", "evaluation", "held out", "epoch", "order", "cache", "precomputed",
              "plain", "reference absent", "schedule", "adam", "resume"),
    "resume": ("replay", "adam", "schedule", "epoch"), "epoch": ("order", "accumulation"), "clip": ("accumulation",),
    "schedule": ("accumulation",), "sft": ("accumulation",), "short micro-batch": ("metrics", "accumulation", "epoch"),
    "adam decay": ("adam", "decay"), "clip tensors": ("clip", "speaking"), "robust": ("smoothing",),
    "cache": ("precomputed", "truncation keep_start", "truncation keep_end"),
    "left pad": ("padding",),
    "long prompt": ("truncation keep_start", "truncation keep_end"),
    "bos chat": ("chat", "bos"), "columns": ("implicit prompt",),
    "lora reference": ("lora",), "lora scale": ("lora",), "defaults": ("clip",),
    "option label_smoothing": ("smoothing", "robust"), "option clip_norm": ("clip",), "option kind": ("hinge",),
    "option kind ipo": ("ipo",), "option momentum": ("momentum",), "option weight_decay": ("decay",),
    "option sft_weight": ("sft",), "option gamma": ("simpo",), "option length_normalised": ("simpo",),
    "option max_length": ("truncation keep_start", "truncation keep_end", "long prompt"),
    "option truncation": ("truncation keep_start", "truncation keep_end", "long prompt"),
    "option schedule": ("schedule",), "option warmup_steps": ("schedule",), "option betas": ("adam",),
    "option epsilon": ("adam",), "option lora alpha": ("lora", "lora reference"),
    "option accumulation": ("accumulation",), "option drop_last": ("epoch",), "option epochs": ("epoch", "order"),
    "option eval_every": ("metrics", "evaluation", "held out", "replay"),
}  # fmt: skip


def ordered(checks: Iterable[Check], capabilities: Iterable[str]) -> list[Check]:
    """The checks in the order in which they are judged.

    A `loss` of the subject's own is judged before everything: nothing else is in it.  Where losses are read from whole
    runs, log-probs and the reference come first.
    """
    early = ("loss", "logz") if "loss" in capabilities else ()

    def place(check: Check) -> tuple[int, ...]:
        stage = STAGES.index(check.stage), CHAPTERS.index(check.chapter)
        special = not any(scene.family in BASIC for scene in check.staged(PAPER))
        if check.chapter in LAST:
            return 9, LAST.index(check.chapter)
        if check.level != "must":
            return 8, *stage
        if check.id in CONTROLS:
            return 5, CONTROLS.index(check.id)
        if check.id in WHOLE or check.chapter not in ("loss", "logz", "logps", "gradient", "reference"):
            return 7, *stage
        if check.chapter == "reference":
            return (2, *stage) if check.id == "REF-START" else (7, *stage)
        if check.chapter in early and check.stage != "rewards":
            return 0, special, *stage
        return {"logps": 1, "loss": 3, "logz": 3, "gradient": 4}[check.chapter], special, *stage

    return sorted(checks, key=place)


def blocks_all(check: Check, family: str) -> bool:
    """Whether a failure of the check in a scene of this family makes everything later superfluous."""
    plainest = check.chapter in ("loss", "logz", "logps", "gradient") or check.id in ("REF-START", *CONTROLS)
    return plainest and family in BASIC


def apart(check: Check, failed: Check, capabilities: Iterable[str]) -> bool:
    """Whether a failure says nothing of a check: log-probs that a function of their own computes are not made of the
    loss, which is another."""
    own = {"loss", "sequence_logps"} <= set(capabilities)
    return own and check.chapter == "logps" and failed.chapter in ("loss", "logz")


def families(family: str) -> tuple[str, ...]:
    """The family and those that it is made of: what failed in one of them blocks it."""
    return family, *MADE_OF.get(family, ())
