"""From a recipe to an artifact: reading the recipe, building the Program, exporting it and running the gates."""
