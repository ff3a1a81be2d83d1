"""One YAML file that says all of a run.

schema    the keys, their defaults and their checks
presets/  recipes by name
"""
