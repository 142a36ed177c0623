"""What people look at: terminal, Graphviz, SVG, JSON, chrome trace."""
