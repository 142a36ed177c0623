"""The decoupled module: the user's model with interfaces."""
