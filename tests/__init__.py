"""The tests; README.md is their map."""
