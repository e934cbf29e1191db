"""All faults, in the order of the table."""

from __future__ import annotations

from faults import attention, codes, experts, files, rest_of_model, runtime
from faults.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *attention.FAULTS,
    *experts.FAULTS,
    *rest_of_model.FAULTS,
    *codes.FAULTS,
    *files.FAULTS,
    *runtime.FAULTS,
)
