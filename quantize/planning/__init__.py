"""Which tensor gets which format: sensitivities, exact allocation, `auto`."""
