"""The one assembly: a ready engine from config, model, data and checkpoint, and the life of a run in its directory."""
