"""One class per optimizer wrapper of DeepSpeed: where it keeps its state, and fixes for its known defects."""
