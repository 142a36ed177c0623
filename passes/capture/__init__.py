"""Capture: from a module to a verified graph over the module's own paths."""
