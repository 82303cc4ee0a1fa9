/* A disk that fails on demand: preloaded into a process, it makes calls on the spool's database files fail.
 *
 * While the file in FAILING_DISK exists, it names the calls and the errno: "sync 5", "write 28".
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

static int must_fail(const char *call, int descriptor) {
    char name[32], path[4096], rule[32], which[16];
    int error;
    snprintf(name, sizeof name, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(name, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, "spool.sqlite")) return 0;
    int control = open(getenv("FAILING_DISK"), O_RDONLY | O_CLOEXEC);
    if (control < 0) return 0;
    ssize_t read_bytes = read(control, rule, sizeof rule - 1);
    close(control);
    if (read_bytes < 0) return 0;
    rule[read_bytes] = 0;
    if (sscanf(rule, "%15s %d", which, &error) != 2 || strcmp(which, call)) return 0;
    errno = error;
    return 1;
}

#define NEXT(type, name) ((type)dlsym(RTLD_NEXT, name))

int fsync(int fd) { return must_fail("sync", fd) ? -1 : NEXT(int (*)(int), "fsync")(fd); }
int fdatasync(int fd) { return must_fail("sync", fd) ? -1 : NEXT(int (*)(int), "fdatasync")(fd); }

ssize_t write(int fd, const void *data, size_t size) {
    if (must_fail("write", fd)) return -1;
    return NEXT(ssize_t (*)(int, const void *, size_t), "write")(fd, data, size);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    if (must_fail("write", fd)) return -1;
    return NEXT(ssize_t (*)(int, const void *, size_t, off_t), "pwrite")(fd, data, size, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    if (must_fail("write", fd)) return -1;
    return NEXT(ssize_t (*)(int, const void *, size_t, off64_t), "pwrite64")(fd, data, size, at);
}
