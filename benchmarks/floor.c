/*
 * The floor: what three C processes reach that move pages as migkit does.
 *
 * A guest (this process) touches random pages of a memfd that is registered with userfaultfd. A
 * destination polls the userfaultfd and two unix sockets; a source maps the pages and answers
 * requests. Every system call that migkit makes for a page is made here too: poll and read or
 * recv, sendmsg, UFFDIO_COPY; buffers of the sockets have migkit's size.
 *
 *   floor fault PAGES GUEST_CPU SOURCE_CPU DESTINATION_CPU
 *       for each number on stdin touch so many pages; write their latencies (u64 ns) to stdout
 *   floor background PAGES ...
 *       send all pages in the background while the guest touches all; write all latencies
 *   floor bulk PAGES ...
 *       send all pages, unframed, 64 at a time, no fault; write one u64, ns
 *
 * A CPU of -1 leaves a process where the scheduler puts it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define CHUNK 16 /* background pages between two looks at the requests */
#define BULK 64
#define SEND_BUFFER (512 << 10)
#define CAPACITY (1 << 20)

enum mode { FAULT, BACKGROUND, BULK_ONLY };

/* A run of pages on the wire; its bytes follow. */
struct run {
    uint64_t first, count;
};

/* What asks for a page: 16 bytes, as REQ_PAGES has. */
struct request {
    uint32_t head, length;
    uint64_t page;
};

static uint64_t n_pages;
static char *guest_ram, *source_ram;
static int uffd, main_source, main_destination, preempt_source, preempt_destination;
static volatile uint64_t *shared; /* 0: the source may begin, 1: ns of the bulk transfer */

static void die(const char *what)
{
    perror(what);
    _exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ULL + t.tv_nsec;
}

static void pin(int cpu)
{
    cpu_set_t set;
    if (cpu < 0)
        return;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    if (sched_setaffinity(0, sizeof set, &set))
        die("sched_setaffinity");
}

static char *map_memfd(const char *name)
{
    int fd = memfd_create(name, MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, n_pages * PAGE))
        die(name);
    char *at = mmap(NULL, n_pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        die(name);
    madvise(at, n_pages * PAGE, MADV_NOHUGEPAGE);
    return at;
}

static void connect_pair(int *one, int *other)
{
    int pair[2], size = SEND_BUFFER;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair))
        die("socketpair");
    for (int i = 0; i < 2; i++)
        setsockopt(pair[i], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    *one = pair[0];
    *other = pair[1];
}

static void unblock(int fd)
{
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
}

static void open_userfaultfd(void)
{
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    struct uffdio_register all = {
        .range = {(uint64_t)guest_ram, n_pages * PAGE}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || ioctl(uffd, UFFDIO_REGISTER, &all))
        die("userfaultfd");
}

static void place(uint64_t first, uint64_t count, const char *from)
{
    struct uffdio_copy copy = {
        .dst = (uint64_t)guest_ram + first * PAGE, .src = (uint64_t)from, .len = count * PAGE};
    if (ioctl(uffd, UFFDIO_COPY, &copy))
        die("UFFDIO_COPY");
}

/* The source. */

static char *is_sent;
static uint64_t cursor;
static struct run run_out;
static struct iovec out[2];
static int out_parts;

/* Send what waits on the main channel; return whether all is with the kernel. */
static int flush_background(void)
{
    while (out_parts) {
        struct msghdr message = {.msg_iov = out + 2 - out_parts, .msg_iovlen = out_parts};
        ssize_t n = sendmsg(main_source, &message, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            return 0;
        if (n < 0)
            die("background");
        while (n > 0) {
            struct iovec *part = out + 2 - out_parts;
            size_t took = (size_t)n < part->iov_len ? (size_t)n : part->iov_len;
            part->iov_base = (char *)part->iov_base + took;
            part->iov_len -= took;
            n -= took;
            if (!part->iov_len)
                out_parts--;
        }
    }
    return 1;
}

/* Send the next pages in a row that nobody asked for; return whether there were any. */
static int send_background(void)
{
    while (cursor < n_pages && is_sent[cursor])
        cursor++;
    if (cursor == n_pages)
        return 0;
    run_out = (struct run){cursor, 0};
    while (run_out.count < CHUNK && cursor < n_pages && !is_sent[cursor]) {
        is_sent[cursor++] = 1;
        run_out.count++;
    }
    out[0] = (struct iovec){&run_out, sizeof run_out};
    out[1] = (struct iovec){source_ram + run_out.first * PAGE, run_out.count * PAGE};
    out_parts = 2;
    flush_background();
    return 1;
}

static void send_requested(uint64_t page)
{
    struct run run = {page, 1};
    struct iovec parts[2] = {{&run, sizeof run}, {source_ram + page * PAGE, PAGE}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    if (is_sent[page])
        return;
    is_sent[page] = 1;
    if (sendmsg(preempt_source, &message, MSG_NOSIGNAL) != (ssize_t)(sizeof run + PAGE))
        die("requested page");
}

static void answer_requests(void)
{
    struct request requests[256];
    ssize_t n = recv(main_source, requests, sizeof requests, 0);
    if (n <= 0 || n % sizeof *requests)
        _exit(0); /* the destination is gone */
    for (size_t i = 0; i < n / sizeof *requests; i++)
        send_requested(requests[i].page);
}

static void run_source(int background)
{
    struct pollfd poller = {.fd = main_source};
    int more = background;
    unblock(main_source);
    while (background && !shared[0])
        usleep(100);
    for (;;) {
        poller.events = POLLIN | (out_parts ? POLLOUT : 0);
        if (poll(&poller, 1, more && !out_parts ? 0 : 1000) < 0)
            die("poll");
        if (poller.revents & (POLLIN | POLLHUP))
            answer_requests();
        else if (out_parts)
            flush_background();
        else if (more)
            more = send_background();
    }
}

static void run_bulk_source(void)
{
    char done;
    while (!shared[0])
        usleep(100);
    uint64_t begun = now_ns();
    for (uint64_t page = 0; page < n_pages; page += BULK)
        if (send(main_source, source_ram + page * PAGE, BULK * PAGE, MSG_NOSIGNAL) !=
            (ssize_t)(BULK * PAGE))
            die("bulk");
    if (recv(main_source, &done, 1, 0) != 1)
        die("bulk end");
    shared[1] = now_ns() - begun;
    _exit(0);
}

/* The destination. */

struct channel {
    int fd;
    char *buffer;
    size_t filled;
};

static char *is_here, *is_asked;

static void read_faults(void)
{
    struct uffd_msg messages[64];
    struct request requests[64];
    size_t asked = 0;
    ssize_t n = read(uffd, messages, sizeof messages);
    for (size_t i = 0; n > 0 && i < n / sizeof *messages; i++) {
        uint64_t page = (messages[i].arg.pagefault.address - (uint64_t)guest_ram) / PAGE;
        struct uffdio_range range = {(uint64_t)guest_ram + page * PAGE, PAGE};
        if (is_here[page])
            ioctl(uffd, UFFDIO_WAKE, &range);
        else if (!is_asked[page]) {
            is_asked[page] = 1;
            requests[asked++] = (struct request){4, 12, page};
        }
    }
    if (asked && send(main_destination, requests, asked * sizeof *requests, MSG_NOSIGNAL) < 0)
        die("request");
}

static void read_runs(struct channel *channel, size_t most)
{
    ssize_t n = recv(channel->fd, channel->buffer + channel->filled, most, 0);
    if (n == 0)
        _exit(0);
    if (n < 0)
        return;
    channel->filled += n;
    size_t at = 0;
    while (channel->filled - at >= sizeof(struct run)) {
        struct run run;
        memcpy(&run, channel->buffer + at, sizeof run);
        size_t size = sizeof run + run.count * PAGE;
        if (channel->filled - at < size)
            break;
        place(run.first, run.count, channel->buffer + at + sizeof run);
        memset(is_here + run.first, 1, run.count);
        at += size;
    }
    memmove(channel->buffer, channel->buffer + at, channel->filled - at);
    channel->filled -= at;
}

static void run_destination(void)
{
    struct channel main_channel = {main_destination, malloc(CAPACITY), 0};
    struct channel preempt = {preempt_destination, malloc(CAPACITY), 0};
    struct pollfd fds[3] = {
        {uffd, POLLIN, 0}, {preempt_destination, POLLIN, 0}, {main_destination, POLLIN, 0}};
    unblock(main_destination);
    unblock(preempt_destination);
    for (;;) {
        if (poll(fds, 3, 1000) < 0)
            die("poll");
        if (fds[0].revents)
            read_faults();
        if (fds[1].revents)
            read_runs(&preempt, 64 << 10);
        if (fds[2].revents)
            read_runs(&main_channel, sizeof(struct run) + CHUNK * PAGE);
    }
}

static void run_bulk_destination(void)
{
    char *buffer = malloc(BULK * PAGE), done = 1;
    for (uint64_t page = 0; page < n_pages; page += BULK) {
        if (recv(main_destination, buffer, BULK * PAGE, MSG_WAITALL) != (ssize_t)(BULK * PAGE))
            _exit(0);
        place(page, BULK, buffer);
    }
    if (send(main_destination, &done, 1, MSG_NOSIGNAL) != 1)
        die("bulk end");
    _exit(0);
}

/* The guest. */

static uint64_t *order, *latency;

static uint64_t random_below(uint64_t n)
{
    static uint64_t x = 88172645463325252ULL;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return x % n;
}

static void shuffle_pages(void)
{
    order = calloc(n_pages, sizeof *order);
    latency = calloc(n_pages, sizeof *latency);
    memset(latency, 1, n_pages * sizeof *latency); /* its own faults come before the clock runs */
    for (uint64_t i = 0; i < n_pages; i++)
        order[i] = i;
    for (uint64_t i = n_pages - 1; i > 0; i--) {
        uint64_t j = random_below(i + 1), swap = order[i];
        order[i] = order[j];
        order[j] = swap;
    }
}

static void touch(uint64_t from, uint64_t to)
{
    for (uint64_t i = from; i < to; i++) {
        volatile uint64_t *word = (uint64_t *)(guest_ram + order[i] * PAGE);
        uint64_t before = now_ns();
        (void)*word;
        latency[i] = now_ns() - before;
    }
}

static void write_out(const void *data, size_t size)
{
    for (const char *at = data; size;) {
        ssize_t n = write(1, at, size);
        if (n < 0)
            die("stdout");
        at += n;
        size -= n;
    }
}

static void touch_as_told(void)
{
    uint64_t at = 0, count;
    while (scanf("%lu", &count) == 1 && at + count <= n_pages) {
        touch(at, at + count);
        write_out(latency + at, count * sizeof *latency);
        at += count;
    }
}

static pid_t start(int cpu, enum mode mode, int is_source)
{
    pid_t pid = fork();
    if (pid)
        return pid;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    close(is_source ? main_destination : main_source);
    close(is_source ? preempt_destination : preempt_source);
    pin(cpu);
    if (mode == BULK_ONLY)
        is_source ? run_bulk_source() : run_bulk_destination();
    else
        is_source ? run_source(mode == BACKGROUND) : run_destination();
    _exit(0);
}

int main(int argc, char **argv)
{
    if (argc != 6)
        return 2;
    enum mode mode = !strcmp(argv[1], "fault")        ? FAULT
                     : !strcmp(argv[1], "background") ? BACKGROUND
                                                      : BULK_ONLY;
    n_pages = strtoull(argv[2], NULL, 10);
    shared = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    guest_ram = map_memfd("floor-guest");
    source_ram = map_memfd("floor-source");
    for (uint64_t page = 0; page < n_pages; page++)
        *(uint64_t *)(source_ram + page * PAGE) = page + 1;
    is_sent = calloc(n_pages, 1);
    is_here = calloc(n_pages, 1);
    is_asked = calloc(n_pages, 1);
    connect_pair(&main_source, &main_destination);
    connect_pair(&preempt_source, &preempt_destination);
    open_userfaultfd();
    pid_t source = start(atoi(argv[4]), mode, 1);
    pid_t destination = start(atoi(argv[5]), mode, 0);
    close(main_source);
    close(main_destination);
    close(preempt_source);
    close(preempt_destination);
    pin(atoi(argv[3]));
    if (mode != BULK_ONLY)
        shuffle_pages();
    usleep(20000); /* both stand ready */
    shared[0] = 1;
    if (mode == FAULT)
        touch_as_told();
    else if (mode == BACKGROUND) {
        touch(0, n_pages);
        write_out(latency, n_pages * sizeof *latency);
    } else {
        waitpid(source, NULL, 0);
        uint64_t took = shared[1];
        write_out(&took, sizeof took);
    }
    kill(source, SIGKILL);
    kill(destination, SIGKILL);
    while (wait(NULL) > 0)
        ;
    return 0;
}
