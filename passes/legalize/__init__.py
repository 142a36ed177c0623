"""Legalize: repair or refuse what would make a cut wrong."""
