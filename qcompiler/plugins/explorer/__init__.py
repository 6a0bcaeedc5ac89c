"""Graphs for Google's Model Explorer, which draws large graphs: pip install "qcompiler[explorer]"."""

from qcompiler.plugins.explorer.graphs import graph_collection as graph_collection
