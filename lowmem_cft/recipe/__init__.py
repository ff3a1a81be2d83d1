"""One YAML file that says all of a run.

schema       the keys, their defaults and their checks
load         a file or a preset, with overrides -> a recipe, and back to YAML
strict_yaml  YAML in which a number is what it looks like
errors       what is wrong with a recipe, and where
presets/     recipes by name
"""
