"""Runs Python code under another `flock` than the C library's: one that a file system or a second process can cause."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

UNSUPPORTED = """
#include <errno.h>
int flock(int file, int operation) { errno = ENOSYS; return -1; }
"""
"""As on Lustre that is mounted without -o flock."""

REMOVED_FIRST = """
#define _GNU_SOURCE
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
int flock(int file, int operation) {
    static int calls = 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (calls++ == 0 && length > 0) { path[length] = 0; unlink(path); }
    return syscall(SYS_flock, file, operation);
}
"""
"""The first file is removed after it was opened and before it is locked, as if its last holder had just finished."""


def run_with_flock(flock: str, code: str, folder: Path) -> str:
    """The output of Python code in a process of its own with this `flock` (C); skips without a C compiler.

    Args:
        folder: for the compiled library.
    """
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs a C compiler and LD_PRELOAD")
    library = folder / "flock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", library], input=flock, text=True, check=True)
    command = [sys.executable, "-c", code]
    environment = os.environ | {"LD_PRELOAD": str(library)}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
