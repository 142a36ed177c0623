"""Random programs with Python control flow."""
