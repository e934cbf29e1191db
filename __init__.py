"""moec: compile Hugging Face Mixture-of-Experts models to deployment targets, with proof."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moec.compiler.api import export, load

__version__ = "0.1.0"
__all__ = ["__version__", "export", "load"]


def __getattr__(name: str) -> Any:
    """Load the Python API on first use: `import moec` itself must cost nothing."""
    if name in {"export", "load"}:
        from moec.compiler import api

        return getattr(api, name)
    raise AttributeError(f"module 'moec' has no attribute {name!r}")
