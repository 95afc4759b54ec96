/* The file layer of the C library, of which one call can be made to fail with a full disk: for LD_PRELOAD.
 *
 * Counted are calls that need space in or below the directory in FAULT_DIRECTORY: creating, writing, syncing, renaming,
 * making directories, lengthening. fault_arm(n) lets the n-th one from now fail, once. A write that fails has written
 * half of its bytes, as a real one does when the disk fills up.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static long countdown, calls;
static int half_written;
static char failed[4600];

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void fault_arm(long n) { countdown = n; calls = 0; half_written = 0; failed[0] = 0; }
long fault_calls(void) { return calls; }
const char *fault_failed(void) { return failed; }

static int below(const char *path) {
    const char *directory = getenv("FAULT_DIRECTORY");
    return directory && path && strncmp(path, directory, strlen(directory)) == 0;
}

static int of_fd(int fd, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    path[n < 0 ? 0 : n] = 0;
    return n >= 0 && below(path);
}

static int fires(const char *call, const char *path) {
    calls++;
    if (countdown > 0 && --countdown == 0) {
        snprintf(failed, sizeof failed, "%s %s", call, path);
        return 1;
    }
    return 0;
}

static int full(void) { errno = ENOSPC; return -1; }

#define PATH_CALL(name, path, real) \
    do { if (below(path) && fires(#name, path)) return full(); return real; } while (0)

int mkdir(const char *path, mode_t mode) { PATH_CALL(mkdir, path, REAL(mkdir)(path, mode)); }
int rename(const char *from, const char *to) { PATH_CALL(rename, to, REAL(rename)(from, to)); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    PATH_CALL(renameat2, to, REAL(renameat2)(a, from, b, to, flags));
}

#define FD_CALL(name, fd, real) \
    do { char path[4096]; if (of_fd(fd, path) && fires(#name, path)) return full(); return real; } while (0)

int fsync(int fd) { FD_CALL(fsync, fd, REAL(fsync)(fd)); }
int fdatasync(int fd) { FD_CALL(fdatasync, fd, REAL(fdatasync)(fd)); }
int ftruncate(int fd, off_t size) { FD_CALL(ftruncate, fd, REAL(ftruncate)(fd, size)); }
int ftruncate64(int fd, off64_t size) { FD_CALL(ftruncate, fd, REAL(ftruncate64)(fd, size)); }
int posix_fallocate(int fd, off_t at, off_t size) {
    char path[4096];
    return of_fd(fd, path) && fires("posix_fallocate", path) ? ENOSPC : REAL(posix_fallocate)(fd, at, size);
}

#define OPEN_MODE(flags) \
    mode_t mode = 0; \
    if ((flags) & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define CREATES(flags, path) ((flags) & O_CREAT && below(path) && access(path, F_OK) != 0 && fires("open", path))

int open(const char *path, int flags, ...) { OPEN_MODE(flags) return CREATES(flags, path) ? full() : REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { OPEN_MODE(flags) return CREATES(flags, path) ? full() : REAL(open64)(path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { OPEN_MODE(flags) return CREATES(flags, path) ? full() : REAL(openat)(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { OPEN_MODE(flags) return CREATES(flags, path) ? full() : REAL(openat64)(at, path, flags, mode); }

/* How many bytes this write may write: all, half, or none. */
static size_t allowed(const char *call, int fd, size_t size) {
    char path[4096];
    if (!of_fd(fd, path)) return size;
    if (half_written) { half_written = 0; return 0; }
    if (!fires(call, path)) return size;
    half_written = size > 1;
    return size / 2;
}

ssize_t write(int fd, const void *data, size_t size) {
    size_t some = size ? allowed("write", fd, size) : 0;
    return size && !some ? full() : REAL(write)(fd, data, some);
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t at) {
    size_t some = size ? allowed("pwrite", fd, size) : 0;
    return size && !some ? full() : REAL(pwrite)(fd, data, some, at);
}
ssize_t pwrite64(int fd, const void *data, size_t size, off64_t at) {
    size_t some = size ? allowed("pwrite", fd, size) : 0;
    return size && !some ? full() : REAL(pwrite64)(fd, data, some, at);
}
ssize_t writev(int fd, const struct iovec *pieces, int count) { FD_CALL(writev, fd, REAL(writev)(fd, pieces, count)); }
