"""Methods of rounding a tensor: to nearest, by GPTQ, or to palettes."""
