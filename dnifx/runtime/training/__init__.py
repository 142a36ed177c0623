"""The trainer: optimizers, training steps, probes and saved states."""
