// Loaded into a process by LD_PRELOAD: writes a line to $WATCH_LOG for each name that is looked up, each address
// that is connected to or sent to, and each path that is opened for writing, made, renamed or removed.

#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace {

template <typename Function>
Function next(const char* name) {
    return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name));
}

void note(const char* what, const char* detail) {
    const char* path = getenv("WATCH_LOG");
    if (path == nullptr) return;
    char line[4500];
    int length = snprintf(line, sizeof line, "%s %s\n", what, detail ? detail : "");
    if (length > static_cast<int>(sizeof line)) length = sizeof line;
    // past the functions below
    long file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_APPEND, 0600);
    if (file < 0) return;
    syscall(SYS_write, file, line, length);
    syscall(SYS_close, file);
}

void note_address(const char* what, const sockaddr* address) {
    if (address == nullptr) return;
    char text[INET6_ADDRSTRLEN] = "";
    if (address->sa_family == AF_INET)
        inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(address)->sin_addr, text, sizeof text);
    else if (address->sa_family == AF_INET6)
        inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr, text, sizeof text);
    else
        return;
    note(what, text);
}

void note_path(const char* what, int folder, const char* path) {
    char whole[4200];
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        char name[64], base[2100];
        if (folder == AT_FDCWD)
            snprintf(name, sizeof name, "/proc/self/cwd");
        else
            snprintf(name, sizeof name, "/proc/self/fd/%d", folder);
        const ssize_t length = readlink(name, base, sizeof base - 1);
        base[length < 0 ? 0 : length] = 0;
        snprintf(whole, sizeof whole, "%s/%s", base, path);
    }
    note(what, whole);
}

bool writes(int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) != 0; }

mode_t mode_of(int flags, va_list arguments) {
    return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}

}  // namespace

#define OPEN(NAME)                                                     \
    int NAME(const char* path, int flags, ...) {                       \
        va_list arguments;                                             \
        va_start(arguments, flags);                                    \
        const mode_t mode = mode_of(flags, arguments);                 \
        va_end(arguments);                                             \
        if (writes(flags)) note_path("write", AT_FDCWD, path);         \
        return next<int (*)(const char*, int, mode_t)>(#NAME)(path, flags, mode); \
    }
#define OPENAT(NAME)                                                   \
    int NAME(int folder, const char* path, int flags, ...) {           \
        va_list arguments;                                             \
        va_start(arguments, flags);                                    \
        const mode_t mode = mode_of(flags, arguments);                 \
        va_end(arguments);                                             \
        if (writes(flags)) note_path("write", folder, path);           \
        return next<int (*)(int, const char*, int, mode_t)>(#NAME)(folder, path, flags, mode); \
    }
#define FOPEN(NAME)                                                    \
    FILE* NAME(const char* path, const char* mode) {                   \
        if (strpbrk(mode, "wa+") != nullptr) note_path("write", AT_FDCWD, path); \
        return next<FILE* (*)(const char*, const char*)>(#NAME)(path, mode); \
    }

extern "C" {

OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
FOPEN(fopen)
FOPEN(fopen64)

int mkdir(const char* path, mode_t mode) {
    note_path("write", AT_FDCWD, path);
    return next<int (*)(const char*, mode_t)>("mkdir")(path, mode);
}

int rename(const char* from, const char* to) {
    note_path("write", AT_FDCWD, from);
    note_path("write", AT_FDCWD, to);
    return next<int (*)(const char*, const char*)>("rename")(from, to);
}

int unlink(const char* path) {
    note_path("write", AT_FDCWD, path);
    return next<int (*)(const char*)>("unlink")(path);
}

int connect(int socket, const sockaddr* address, socklen_t length) {
    note_address("connect", address);
    return next<int (*)(int, const sockaddr*, socklen_t)>("connect")(socket, address, length);
}

ssize_t sendto(int socket, const void* data, size_t size, int flags, const sockaddr* to, socklen_t length) {
    note_address("send", to);
    return next<ssize_t (*)(int, const void*, size_t, int, const sockaddr*, socklen_t)>("sendto")(
        socket, data, size, flags, to, length);
}

int getaddrinfo(const char* node, const char* service, const addrinfo* hints, addrinfo** result) {
    note("look-up", node);
    return next<int (*)(const char*, const char*, const addrinfo*, addrinfo**)>("getaddrinfo")(
        node, service, hints, result);
}

hostent* gethostbyname(const char* name) {
    note("look-up", name);
    return next<hostent* (*)(const char*)>("gethostbyname")(name);
}

}  // extern "C"
