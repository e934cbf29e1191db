"""How a tensor is rounded: to nearest, by GPTQ, to a palette."""
