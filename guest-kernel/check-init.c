// The guest half of guest-kernel/check: PID 1 of a throwaway machine that tries, one by one, what
// containers need from the pico kernel, prints a line for each and "N passed, N failed", and reboots.
// Expects a virtio block device with EROFS, one for ext4, a network card, a console port, a balloon.

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/io_uring.h>
#include <linux/membarrier.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <linux/vm_sockets.h>
#include <mqueue.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/fanotify.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/msg.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/sem.h>
#include <sys/shm.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

static int passed, failed;

static void report(const char *name, int ok) {
    if (ok) {
        passed++;
        printf("ok      %s\n", name);
    } else {
        failed++;
        printf("FAILED  %s: %s\n", name, strerror(errno));
    }
    fflush(stdout);
}

// CHECK(name, condition): errno of the condition's last call is the reason shown.
#define CHECK(name, condition) (errno = 0, report(name, (condition)))

static int file_contains(const char *path, const char *text) {
    static char buffer[65536];
    int fd = open(path, O_RDONLY);
    if (fd < 0) return 0;
    ssize_t length = 0, got;
    while ((got = read(fd, buffer + length, sizeof buffer - 1 - (size_t)length)) > 0) length += got;
    close(fd);
    buffer[length] = 0;
    return strstr(buffer, text) != NULL;
}

static int write_file(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT, 0644);
    if (fd < 0) return 0;
    int ok = write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    close(fd);
    return ok;
}

static int mounts(const char *source, const char *target, const char *type, const char *options) {
    mkdir(target, 0755);
    return mount(source, target, type, 0, options) == 0;
}

// Runs `body` in a child; true if it exits with 0.
static int in_child(int (*body)(void)) {
    pid_t pid = fork();
    if (pid == 0) _exit(body() ? 0 : 1);
    int status;
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// --- file systems ---------------------------------------------------------------------------

static void check_filesystems(void) {
    char text[64] = "";
    CHECK("erofs: mount from virtio-blk", mount("/dev/vda", "/lower", "erofs", MS_RDONLY, NULL) == 0);
    CHECK("erofs: read a file", file_contains("/lower/hello", "from the image"));
    CHECK("erofs: extended attributes are known",
          getxattr("/lower/hello", "trusted.a", text, sizeof text) < 0 && errno == ENODATA);
    CHECK("tmpfs", mounts("tmpfs", "/rw", "tmpfs", "size=8m"));
    mkdir("/rw/upper", 0755);
    mkdir("/rw/work", 0755);
    CHECK("tmpfs: extended attribute", write_file("/rw/file", "x") && !setxattr("/rw/file", "trusted.a", "b", 1, 0));
    CHECK("tmpfs: POSIX ACL is known",
          getxattr("/rw/file", "system.posix_acl_access", text, sizeof text) < 0 && errno == ENODATA);
    CHECK("overlayfs: mount over erofs",
          mounts("overlay", "/merged", "overlay", "lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work"));
    CHECK("overlayfs: write, copied up",
          write_file("/merged/hello", "written") && file_contains("/merged/hello", "written") &&
              file_contains("/lower/hello", "from the image"));
    CHECK("overlayfs: delete leaves a whiteout", !unlink("/merged/hello") && access("/lower/hello", F_OK) == 0 &&
                                                     access("/merged/hello", F_OK) < 0);
    CHECK("ext4: mount from virtio-blk", mounts("/dev/vdb", "/volume", "ext4", NULL));
    CHECK("ext4: write and sync", write_file("/volume/file", "kept") && (sync(), file_contains("/volume/file", "kept")));
    CHECK("ext4: POSIX ACL is known",
          getxattr("/volume/file", "system.posix_acl_access", text, sizeof text) < 0 && errno == ENODATA);
    CHECK("devpts, Unix98 pty", mounts("devpts", "/dev/pts", "devpts", "ptmxmode=0666") && posix_openpt(O_RDWR) >= 0);
    CHECK("/dev/shm", mounts("tmpfs", "/dev/shm", "tmpfs", NULL));
    CHECK("fuse: /dev/fuse", open("/dev/fuse", O_RDWR) >= 0);
    CHECK("virtiofs is registered", file_contains("/proc/filesystems", "virtiofs"));
    CHECK("inotify", inotify_add_watch(inotify_init1(0), "/rw", IN_CREATE) >= 0);
    CHECK("fanotify", fanotify_init(FAN_CLASS_NOTIF, O_RDONLY) >= 0);
    struct flock lock = {.l_type = F_WRLCK};
    CHECK("file locks", fcntl(open("/rw/file", O_RDWR), F_SETLK, &lock) == 0);
    struct { struct file_handle handle; unsigned char bytes[128]; } handle = {.handle.handle_bytes = 128};
    int mount_id;
    CHECK("file handles", name_to_handle_at(AT_FDCWD, "/rw/file", &handle.handle, &mount_id, 0) == 0);
}

// --- isolation ------------------------------------------------------------------------------

static int new_user(void) {
    return unshare(CLONE_NEWUSER) == 0 && write_file("/proc/self/setgroups", "deny") && write_file("/proc/self/uid_map", "0 0 1") &&
           getuid() == 0;
}
static int new_pid(void) {
    if (unshare(CLONE_NEWPID)) return 0;
    pid_t pid = fork();
    if (pid == 0) _exit(getpid() == 1 ? 0 : 1);
    int status;
    return waitpid(pid, &status, 0) == pid && status == 0;
}
static int new_net(void) { return unshare(CLONE_NEWNET) == 0; }
static int new_ipc(void) { return unshare(CLONE_NEWIPC) == 0; }
static int new_mount(void) { return unshare(CLONE_NEWNS) == 0; }
static int new_cgroup(void) { return unshare(CLONE_NEWCGROUP) == 0; }
static int new_time(void) { return unshare(CLONE_NEWTIME) == 0; }
static int new_uts(void) {
    struct utsname name;
    return unshare(CLONE_NEWUTS) == 0 && sethostname("other", 5) == 0 && uname(&name) == 0 && !strcmp(name.nodename, "other");
}
static int filtered(void) {
    // getppid fails with EPERM, everything else is allowed
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    return !prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program) &&
           syscall(SYS_getppid) == -1 && errno == EPERM;
}
static int other_user(void) {
    return !setgid(1000) && !setuid(1000) && getuid() == 1000 && open("/dev/mem", O_RDONLY) < 0;
}

// A group with 16 MiB of memory: a child that writes 64 MiB of it is killed.
static int memory_limit(void) {
    if (!write_file("/sys/fs/cgroup/small/memory.max", "16777216")) return 0;
    pid_t pid = fork();
    if (pid == 0) {
        char own[16];
        snprintf(own, sizeof own, "%d", getpid());
        if (!write_file("/sys/fs/cgroup/small/cgroup.procs", own)) _exit(1);
        char *memory = mmap(NULL, 64 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(memory, 1, 64 << 20);
        _exit(0);
    }
    int status;
    return waitpid(pid, &status, 0) == pid && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL;
}

static void check_isolation(void) {
    CHECK("namespace: user", in_child(new_user));
    CHECK("namespace: pid", in_child(new_pid));
    CHECK("namespace: net", in_child(new_net));
    CHECK("namespace: ipc", in_child(new_ipc));
    CHECK("namespace: uts", in_child(new_uts));
    CHECK("namespace: mount", in_child(new_mount));
    CHECK("namespace: cgroup", in_child(new_cgroup));
    CHECK("namespace: time", in_child(new_time));
    CHECK("seccomp filter", in_child(filtered));
    CHECK("users other than root", in_child(other_user));

    CHECK("cgroup v2", mounts("cgroup2", "/sys/fs/cgroup", "cgroup2", NULL));
    static const char *const controllers[] = {"cpuset", "cpu", "io", "memory", "pids"};
    for (size_t i = 0; i < sizeof controllers / sizeof *controllers; i++) {
        char name[64], enable[32];
        snprintf(name, sizeof name, "cgroup v2 controller: %s", controllers[i]);
        snprintf(enable, sizeof enable, "+%s", controllers[i]);
        CHECK(name, write_file("/sys/fs/cgroup/cgroup.subtree_control", enable));
    }
    mkdir("/sys/fs/cgroup/small", 0755);
    CHECK("cgroup v2: CPU bandwidth", write_file("/sys/fs/cgroup/small/cpu.max", "50000 100000"));
    CHECK("cgroup v2: io.max", access("/sys/fs/cgroup/small/io.max", W_OK) == 0);
    CHECK("cgroup v2: freezer", write_file("/sys/fs/cgroup/small/cgroup.freeze", "1") &&
                                    write_file("/sys/fs/cgroup/small/cgroup.freeze", "0"));
    CHECK("cgroup v2: memory.max kills", memory_limit());
}

// --- system calls ---------------------------------------------------------------------------

static void *count_up(void *counter) {
    __atomic_add_fetch((int *)counter, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

static int threads_work(void) {
    pthread_t thread;
    int counter = 0;
    return !pthread_create(&thread, NULL, count_up, &counter) && !pthread_join(thread, NULL) && counter == 1;
}

static int aio_works(void) {
    unsigned long context = 0;
    return syscall(SYS_io_setup, 1, &context) == 0 && syscall(SYS_io_destroy, context) == 0;
}

static int userfaultfd_works(void) {
    struct uffdio_api api = {.api = UFFD_API};
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    return fd >= 0 && ioctl(fd, UFFDIO_API, &api) == 0;
}

static int sleeps_precisely(void) {
    // Outside KVM the TSC is trusted only after a second of comparing it with another clock.
    for (int i = 0; i < 40 && file_contains("/sys/devices/system/clocksource/clocksource0/current_clocksource", "early"); i++)
        usleep(100000);
    // The best of many: a busy host delays some. Without them, no sleep ends before the next tick (10 ms).
    struct timespec wait = {0, 1000000}, before, after;
    long best = 1000000;
    for (int i = 0; i < 50; i++) {
        clock_gettime(CLOCK_MONOTONIC, &before);
        nanosleep(&wait, NULL);
        clock_gettime(CLOCK_MONOTONIC, &after);
        long micros = (after.tv_sec - before.tv_sec) * 1000000 + (after.tv_nsec - before.tv_nsec) / 1000;
        if (micros < best) best = micros;
    }
    printf("        (the best of 50 sleeps of 1000 us took %ld us)\n", best);
    return best >= 1000 && best < 5000;
}

static int script_runs(void) {
    if (!write_file("/rw/script", "#!/init --exit-42\n") || chmod("/rw/script", 0755)) return 0;
    pid_t pid = fork();
    if (pid == 0) {
        execl("/rw/script", "script", (char *)NULL);
        _exit(1);
    }
    int status;
    return waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 42;
}

static int core_is_dumped(void) {
    pid_t pid = fork();
    if (pid == 0) {
        struct { unsigned long soft, hard; } unlimited = {~0ul, ~0ul};
        syscall(SYS_setrlimit, 4 /* RLIMIT_CORE */, &unlimited);
        if (chdir("/rw")) _exit(1);
        abort();
    }
    int status;
    return waitpid(pid, &status, 0) == pid && WCOREDUMP(status);
}

// What init does to reach the VMM: the physical address of its own page, found in pagemap, shows
// the same bytes through /dev/mem.
static int page_seen_through_dev_mem(void) {
    long *page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    *page = 0x7069636f;
    unsigned long entry = 0;
    int map = open("/proc/self/pagemap", O_RDONLY), memory = open("/dev/mem", O_RDWR);
    if (map < 0 || memory < 0) return 0;
    if (pread(map, &entry, 8, (off_t)((unsigned long)page / 4096 * 8)) != 8 || !(entry >> 63)) return 0;
    long *seen = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, memory, (off_t)((entry & ((1ul << 55) - 1)) * 4096));
    return seen != MAP_FAILED && *seen == 0x7069636f && (*seen = 1) && *page == 1;
}

static int mmio_readable_through_dev_mem(void) {
    // The version register of the local APIC: any MMIO page beyond RAM does.
    int memory = open("/dev/mem", O_RDWR | O_SYNC);
    volatile unsigned *page = mmap(NULL, 4096, PROT_READ, MAP_SHARED, memory, 0xfee00000);
    return page != MAP_FAILED && page[0x30 / 4] != 0;
}

static void check_system_calls(void) {
    struct io_uring_params parameters = {0};
    char buffer[64];
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGUSR1);

    CHECK("epoll", epoll_create1(0) >= 0);
    CHECK("eventfd", eventfd(0, 0) >= 0);
    CHECK("signalfd", signalfd(-1, &set, 0) >= 0);
    CHECK("timerfd", timerfd_create(CLOCK_MONOTONIC, 0) >= 0);
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_NONE};
    CHECK("POSIX timers", timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
    CHECK("high-resolution timers", sleeps_precisely());
    CHECK("io_uring", syscall(SYS_io_uring_setup, 4, &parameters) >= 0);
    CHECK("aio", aio_works());
    CHECK("futex, threads", threads_work());
    CHECK("rseq (glibc registered it)", syscall(SYS_rseq, NULL, 0, 0, 0) == -1 && errno != ENOSYS);
    CHECK("membarrier", syscall(SYS_membarrier, MEMBARRIER_CMD_QUERY, 0, 0) > 0);
    CHECK("memfd", memfd_create("x", MFD_CLOEXEC | MFD_ALLOW_SEALING) >= 0);
    CHECK("userfaultfd", userfaultfd_works());
    CHECK("madvise", madvise(mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), 4096, MADV_DONTNEED) == 0);
    CHECK("pidfd", syscall(SYS_pidfd_open, getpid(), 0) >= 0);
    CHECK("getrandom", getentropy(buffer, sizeof buffer) == 0);
    CHECK("SysV shared memory", shmget(IPC_PRIVATE, 4096, IPC_CREAT | 0600) >= 0);
    CHECK("SysV semaphores", semget(IPC_PRIVATE, 1, IPC_CREAT | 0600) >= 0);
    CHECK("SysV messages", msgget(IPC_PRIVATE, IPC_CREAT | 0600) >= 0);
    CHECK("POSIX message queues", mq_open("/queue", O_CREAT | O_RDWR, 0600, NULL) >= 0 && mounts("mqueue", "/dev/mqueue", "mqueue", NULL));
    CHECK("process_vm_readv", syscall(SYS_process_vm_readv, getpid(), NULL, 0, NULL, 0, 0) == 0);
    CHECK("scripts (#!)", script_runs());
    CHECK("core dumps", core_is_dumped());
    CHECK("/proc/sys", write_file("/proc/sys/kernel/hostname", "checked"));
    CHECK("pagemap and /dev/mem: own page", page_seen_through_dev_mem());
    CHECK("/dev/mem: MMIO page", mmio_readable_through_dev_mem());
}

// --- network --------------------------------------------------------------------------------

static int loopback_tcp(int family, struct sockaddr *address, socklen_t length) {
    int server = socket(family, SOCK_STREAM, 0), client = socket(family, SOCK_STREAM, 0);
    return !bind(server, address, length) && !listen(server, 1) && !getsockname(server, address, &length) &&
           !connect(client, address, length) && accept(server, NULL, NULL) >= 0;
}

static void check_network(void) {
    struct { char name[16]; short flags; char rest[22]; } loopback = {"lo", 1 /* IFF_UP */, ""};
    int pair[2];
    CHECK("loopback up", ioctl(socket(AF_INET, SOCK_DGRAM, 0), 0x8914 /* SIOCSIFFLAGS */, &loopback) == 0);
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    CHECK("TCP over IPv4", loopback_tcp(AF_INET, (struct sockaddr *)&four, sizeof four));
    CHECK("TCP over IPv6", loopback_tcp(AF_INET6, (struct sockaddr *)&six, sizeof six));
    CHECK("unix sockets", socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair) == 0);
    CHECK("packet sockets", socket(AF_PACKET, SOCK_RAW, 0) >= 0);
    CHECK("netlink", socket(AF_NETLINK, SOCK_RAW, 0) >= 0);
    CHECK("no vsock", socket(AF_VSOCK, SOCK_STREAM, 0) < 0 && errno == EAFNOSUPPORT);
    CHECK("virtio-net", access("/sys/class/net/eth0", F_OK) == 0);
}

// --- devices and CPUs -----------------------------------------------------------------------

static int has_driver(const char *driver) {
    char path[128];
    snprintf(path, sizeof path, "/sys/bus/virtio/drivers/%s", driver);
    DIR *directory = opendir(path);
    if (!directory) return 0;
    int bound = 0;
    for (struct dirent *entry; (entry = readdir(directory));) bound |= !strncmp(entry->d_name, "virtio", 6);
    closedir(directory);
    return bound;
}

static void check_machine(void) {
    char name[64];
    snprintf(name, sizeof name, "CPUs from the MP table: %d", get_nprocs());
    CHECK(name, get_nprocs() == 2);
    CHECK("virtio-console port", has_driver("virtio_console") && access("/dev/vport0p1", F_OK) * access("/dev/vport1p1", F_OK) *
                                     access("/dev/vport2p1", F_OK) * access("/dev/vport3p1", F_OK) * access("/dev/vport4p1", F_OK) *
                                     access("/dev/vport5p1", F_OK) == 0);
    CHECK("virtio-balloon", has_driver("virtio_balloon"));
    CHECK("virtio-rng", has_driver("virtio_rng") && access("/dev/hwrng", R_OK) == 0);
    CHECK("no PCI", access("/sys/bus/pci", F_OK) < 0);
    CHECK("no ACPI", access("/sys/firmware/acpi", F_OK) < 0);
}

int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--exit-42")) return 42;
    mkdir("/proc", 0755), mkdir("/sys", 0755), mkdir("/dev", 0755), mkdir("/lower", 0755);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL);
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    int console = open("/dev/console", O_RDWR);
    for (int i = 0; i < 3; i++) dup2(console, i);

    check_machine();
    check_filesystems();
    check_isolation();
    check_system_calls();
    check_network();

    printf("guest kernel: %d passed, %d failed\n", passed, failed);
    fflush(stdout);
    tcdrain(1);
    sync();
    reboot(RB_AUTOBOOT);
}
