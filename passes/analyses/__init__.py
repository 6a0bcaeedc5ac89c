"""Graph analyses shared by several passes; nothing here rewrites a graph."""
