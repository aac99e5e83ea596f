"""Runs whose steps another library takes: what a trainer may read of the recipe, what it is handed, its record."""
