"""The DeepSpeed JSON: what a run and its file say, checked and completed into the final config."""
