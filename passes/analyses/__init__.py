"""What several passes ask about a graph; nothing here rewrites one."""
