"""Command-line flags of benchmarks."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser, **defaults: object) -> None:
    """Add a flag for each of `defaults`, with the type of the default: `slow_down=0.15` adds `--slow-down`, a float."""
    for name, default in defaults.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
