"""The JSON schema of recipes, by which editors complete and check them: `values` of options, `sections` of a recipe."""
