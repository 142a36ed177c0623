"""Capture by recording: run the model once on real inputs, and write an fx graph while it runs."""
