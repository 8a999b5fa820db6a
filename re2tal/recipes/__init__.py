"""Published and demo settings: RECIPES names them."""

from re2tal.recipes.presets import RECIPES, find_recipe

__all__ = ["RECIPES", "find_recipe"]
