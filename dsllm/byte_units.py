"""Units of memory and disk space, in bytes."""

MEGABYTE = 10**6
KIB = 2**10
MIB = 2**20
GIB = 2**30
