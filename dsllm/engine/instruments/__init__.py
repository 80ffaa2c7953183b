"""Looks into a run: times, counts, statistics of layers, and where numbers first go wrong."""
