"""Parity: the engine's training compared with plain single-process PyTorch, combination by combination."""
