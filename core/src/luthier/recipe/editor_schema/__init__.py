"""The JSON schema of recipes, by which editors complete and check them.

`option_schemas` has the types of options, `part_schemas` the parts, and `whole_recipe` the rest of a recipe.
"""
