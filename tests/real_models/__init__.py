"""Real models and models that are hard to capture or to cut."""
