"""Many recipes of one model: what may be varied, how it is judged without building it, and the front that is found."""
