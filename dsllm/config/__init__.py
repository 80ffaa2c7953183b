"""Every field of a run, with its unit and its default: one file without torch per branch of the tree."""
