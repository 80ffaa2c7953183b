"""A run's state on disk: slices of every parameter, published atomically, readable under any layout."""
