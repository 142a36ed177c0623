"""Cuts: from what the user asked for to one partition for every node."""
