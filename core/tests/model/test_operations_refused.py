"""Why a module keeps its own forward: found, told apart and logged."""
