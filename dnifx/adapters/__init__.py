"""Training frameworks that multiply the loss: each adapter tells the nets in a module by what. Import the one that you use."""
