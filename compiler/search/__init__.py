"""Search over recipes of one model: the search space, evaluation of a recipe without a build, and the Pareto front."""
