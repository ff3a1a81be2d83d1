"""Asking for a run of a paper."""

from __future__ import annotations

from reproducing import ask  # noqa: F401
