"""The one seam to DeepSpeed: final config, ranks, device, precision, one optimizer step, this rank's state as slices."""
