"""The network: a decoder-only transformer, single-device code, read top to bottom in transformer.py."""
