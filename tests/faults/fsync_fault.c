/* Preloaded into the daemon, this library makes fsync and fdatasync fail if the file FSYNC_FAULT holds "EIO", and
   take 200 ms if it holds "SLOW". */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int faulty(const char *name, int descriptor)
{
    char fault[8] = "";
    const char *path = getenv("FSYNC_FAULT");
    int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (file >= 0) {
        if (read(file, fault, sizeof fault - 1) < 0)
            fault[0] = 0;
        close(file);
    }
    if (!strncmp(fault, "EIO", 3)) {
        errno = EIO;
        return -1;
    }
    if (!strncmp(fault, "SLOW", 4))
        usleep(200000);
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    return real(descriptor);
}

int fsync(int descriptor) { return faulty("fsync", descriptor); }
int fdatasync(int descriptor) { return faulty("fdatasync", descriptor); }
