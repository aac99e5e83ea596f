"""The embedded model and data, which `model: demo` means in a recipe."""

from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).parent
MODEL: Final = HERE / "model"
RECIPE: Final = HERE / "recipe.yaml"
