/* Preloaded: kills the process before its N-th operation that changes a file or folder below a root, whoever calls it. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static atomic_int count;
static int kill_before;

void attack_begin(const char *folder, int number) {
    strncpy(root, folder, sizeof root - 1);
    kill_before = number;
    count = 0;
}

int attack_count(void) { return count; }

static void changes(int folder, const char *path) {
    char full[2 * PATH_MAX] = "";
    if (!root[0]) return;
    if (!path || path[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, folder == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", folder);
        ssize_t length = readlink(link, full, PATH_MAX);
        if (length < 0) return;
        full[length] = 0;
        if (path) { strcat(full, "/"); strncat(full, path, PATH_MAX); }
        path = full;
    }
    if (strncmp(path, root, strlen(root)) == 0 && ++count == kill_before) kill(getpid(), SIGKILL);
}

#define REAL(name) __typeof__(name) *real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)
#define WRITES(flags) ((flags) & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR))
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (WRITES(flags)) changes(AT_FDCWD, path); \
        REAL(name); return real(path, flags, mode); }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        if (WRITES(flags)) changes(folder, path); \
        REAL(name); return real(folder, path, flags, mode); }
#define CALL(type, name, folder, path, parameters, arguments) \
    type name parameters { changes(folder, path); REAL(name); return real arguments; }

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
CALL(int, mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
CALL(int, rmdir, AT_FDCWD, path, (const char *path), (path))
CALL(int, unlink, AT_FDCWD, path, (const char *path), (path))
CALL(int, chmod, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
CALL(int, rename, AT_FDCWD, from, (const char *from, const char *to), (from, to))
CALL(int, unlinkat, folder, path, (int folder, const char *path, int flags), (folder, path, flags))
CALL(int, renameat, folder, from, (int folder, const char *from, int into, const char *to), (folder, from, into, to))
CALL(ssize_t, write, file, NULL, (int file, const void *content, size_t size), (file, content, size))
CALL(ssize_t, writev, file, NULL, (int file, const struct iovec *parts, int number), (file, parts, number))
CALL(ssize_t, pwrite, file, NULL, (int file, const void *content, size_t size, off_t at), (file, content, size, at))
CALL(ssize_t, pwrite64, file, NULL, (int file, const void *content, size_t size, off64_t at), (file, content, size, at))
CALL(int, ftruncate, file, NULL, (int file, off_t size), (file, size))
CALL(int, ftruncate64, file, NULL, (int file, off64_t size), (file, size))
CALL(int, fallocate, file, NULL, (int file, int mode, off_t at, off_t size), (file, mode, at, size))
CALL(int, posix_fallocate, file, NULL, (int file, off_t at, off_t size), (file, at, size))
CALL(int, fsync, file, NULL, (int file), (file))
CALL(int, fdatasync, file, NULL, (int file), (file))
CALL(int, fchmod, file, NULL, (int file, mode_t mode), (file, mode))
CALL(ssize_t, sendfile, file, NULL, (int file, int from, off_t *at, size_t size), (file, from, at, size))
CALL(ssize_t, sendfile64, file, NULL, (int file, int from, off64_t *at, size_t size), (file, from, at, size))
CALL(ssize_t, copy_file_range, into, NULL,
     (int from, off64_t *at, int into, off64_t *to, size_t size, unsigned flags), (from, at, into, to, size, flags))
