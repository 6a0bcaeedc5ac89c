"""Passes that divide a graph among the ranks of a mesh: placements, collectives, then the program of one rank."""
