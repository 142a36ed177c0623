"""Training frameworks: each with accumulation, against one large batch."""
