"""Legalize: what would make a cut wrong is mended or refused."""
