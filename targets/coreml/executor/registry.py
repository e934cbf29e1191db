"""The table of kernels: all op types that the executor can run, except control flow and states."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moec.targets.coreml.executor import (
    activation,
    constexpr,
    convolution,
    elementwise,
    indexing,
    linear,
    normalization,
    reduce,
    shape,
)

if TYPE_CHECKING:
    from moec.targets.coreml.executor.kernel import Kernel

KERNELS: dict[str, Kernel] = {
    **elementwise.KERNELS,
    **activation.KERNELS,
    **linear.KERNELS,
    **convolution.KERNELS,
    **normalization.KERNELS,
    **reduce.KERNELS,
    **shape.KERNELS,
    **indexing.KERNELS,
}
CONSTEXPR_KERNELS: dict[str, Kernel] = constexpr.KERNELS
