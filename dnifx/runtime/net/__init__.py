"""The net: a model with estimators on its cuts, its parts and their graphs."""
