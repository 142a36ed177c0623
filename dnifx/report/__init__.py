"""Reports on a program: for the terminal, and as Graphviz, SVG, JSON and Chrome trace."""
