"""Every knob of a run, its unit and its default: one torch-free file per branch of the tree."""
