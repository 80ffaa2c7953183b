/* Delays every pread of a .bin file by SLOW_READS_MS milliseconds, as a busy network file system does. For LD_PRELOAD. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static int is_bin(int descriptor) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path);
    return length > 4 && memcmp(path + length - 4, ".bin", 4) == 0;
}

static void wait_if_bin(int descriptor) {
    const char *text = getenv("SLOW_READS_MS");
    double milliseconds = text ? atof(text) : 0;
    if (milliseconds <= 0 || !is_bin(descriptor)) return;
    long nanoseconds = (long)(milliseconds * 1e6);
    struct timespec time = {nanoseconds / 1000000000L, nanoseconds % 1000000000L};
    nanosleep(&time, NULL);
}

ssize_t pread(int descriptor, void *buffer, size_t count, off_t offset) {
    static ssize_t (*original)(int, void *, size_t, off_t);
    if (!original) original = (ssize_t (*)(int, void *, size_t, off_t))dlsym(RTLD_NEXT, "pread");
    wait_if_bin(descriptor);
    return original(descriptor, buffer, count, offset);
}

ssize_t pread64(int descriptor, void *buffer, size_t count, off64_t offset) {
    static ssize_t (*original)(int, void *, size_t, off64_t);
    if (!original) original = (ssize_t (*)(int, void *, size_t, off64_t))dlsym(RTLD_NEXT, "pread64");
    wait_if_bin(descriptor);
    return original(descriptor, buffer, count, offset);
}
