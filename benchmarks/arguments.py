"""Flags of benchmarks."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add a flag for each of `defaults`, which has the type of its default: `slow_down=0.15` is `--slow-down 0.2`."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
