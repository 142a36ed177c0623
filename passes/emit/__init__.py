"""Emit: graphs and readable Python for both targets."""
