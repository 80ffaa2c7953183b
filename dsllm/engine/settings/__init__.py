"""The DeepSpeed JSON: one table of its keys, the checks that read the table, and the final config that DeepSpeed gets."""
