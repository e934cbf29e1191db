"""The one way from a recipe to an artifact: the recipe, what its sections mean, the export and its gates."""
