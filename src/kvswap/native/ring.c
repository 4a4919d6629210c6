/* Reads through io_uring: filling the rings that are shared with the kernel, and emptying them.
 *
 * kvswap.disk.uring_ring sets the rings up and has the same in NumPy. One thread at a time on one ring. The kernel's
 * structures are written out here, because not every C library brings <linux/io_uring.h>.
 *
 * Every read in the ring has a place in a table, and its number there is its user data. `room` places are free, and
 * the list `free` has their numbers first. So there are never more than `depth` reads in flight.
 */
#include <errno.h>

#include "common.h"

#if defined(__linux__)
#include <unistd.h>

#define ENTER 426 /* io_uring_enter */
#define GETEVENTS 1l
#define OP_READ 22
#define NOBODY (-1)
#define WITHIN(number, end) ((uint64_t)(number) < (uint64_t)(end)) /* a negative number is a very large one */

typedef struct {
    uint8_t opcode, flags;
    uint16_t priority;
    int32_t fd;
    uint64_t offset, address;
    uint32_t length, read_flags;
    uint64_t user, rest[3];
} Entry; /* io_uring_sqe */

typedef struct {
    uint64_t user;
    int32_t result;
    uint32_t flags;
} Completion; /* io_uring_cqe */

typedef struct {
    int64_t ticket, number, file, offset, length, address, result;
} Read;

typedef struct {
    int64_t left, bytes; /* reads in the ring, and bytes of reads that are complete */
} Ticket;

typedef struct {
    uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail;
    Entry *entries;
    const Completion *completions;
    Read *reads, *failed; /* [depth] each */
    int64_t *free;        /* [depth] */
    Ticket *tickets;
    const int64_t *fds;    /* [files]: the descriptor of each file */
    const int64_t *wanted; /* four rows of `depth`: file, offset, length and memory address of reads to start */
    int64_t fd, entries_count, completions_count, depth, room, tickets_count, files;
} Ring;

/* Hand what was filled in to the kernel, and block for `wait_for` completions. Returns 0 or the errno. */
static int64_t enter(const Ring *ring, int64_t wait_for) {
    if (ring->fd < 0) return EBADF;
    const uint32_t filled = *ring->sq_tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
    const long flags = wait_for ? GETEVENTS : 0l;
    return syscall(ENTER, (long)ring->fd, (long)filled, (long)wait_for, flags, 0l, 0l) < 0 ? errno : 0;
}

/* Start the first `count` reads of `wanted`: they are numbers `number` and on of the ticket's reads. Returns 0, or the
 * errno of handing them over: they are in the ring then, and the next call hands them over. Returns -1 where a number
 * is outside of what there is, or there is no room; nothing was done then.
 */
EXPORT int64_t kvswap_ring_submit(Ring *ring, int64_t ticket, int64_t number, int64_t count) {
    const int64_t *file = ring->wanted, *offset = file + ring->depth;
    const int64_t *length = offset + ring->depth, *address = length + ring->depth;
    if (!WITHIN(ticket, ring->tickets_count) || !WITHIN(count, ring->room + 1)) return -1;
    const uint32_t tail = *ring->sq_tail, mask = (uint32_t)ring->entries_count - 1;
    const uint32_t filled = tail - __atomic_load_n(ring->sq_head, __ATOMIC_ACQUIRE);
    if (count > ring->entries_count - (int64_t)filled) return -1;
    for (int64_t i = 0; i < count; i++)
        if (!WITHIN(file[i], ring->files) || !WITHIN(length[i], (int64_t)INT32_MAX + 1)) return -1;
    for (int64_t i = 0; i < count; i++) {
        const int64_t place = ring->free[--ring->room];
        ring->reads[place] = (Read){ticket, number + i, file[i], offset[i], length[i], address[i], 0};
        ring->entries[(tail + (uint32_t)i) & mask] = (Entry){.opcode = OP_READ,
                                                             .fd = (int32_t)ring->fds[file[i]],
                                                             .offset = (uint64_t)offset[i],
                                                             .address = (uint64_t)address[i],
                                                             .length = (uint32_t)length[i],
                                                             .user = (uint64_t)place};
    }
    ring->tickets[ticket].left += count;
    __atomic_store_n(ring->sq_tail, tail + (uint32_t)count, __ATOMIC_RELEASE);
    return enter(ring, 0);
}

/* Block for `wait_for` completions, if it is not 0, then account for all that are there. Complete reads are taken off
 * their tickets. Those that came short or failed go to `failed`, and their tickets still count them. Returns how many
 * went there, or the negative errno of blocking. A completion of no read in the table is -EPROTO.
 */
EXPORT int64_t kvswap_ring_collect(Ring *ring, int64_t wait_for) {
    if (!ring->depth) return -EBADF; /* closed: there is no memory */
    const int64_t error = wait_for ? enter(ring, wait_for) : 0;
    const uint32_t tail = __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE);
    const uint32_t mask = (uint32_t)ring->completions_count - 1;
    int64_t failed = 0;
    if (error) return -error;
    for (uint32_t head = *ring->cq_head; head != tail; head++) {
        const Completion *done = &ring->completions[head & mask];
        Read *read = &ring->reads[WITHIN(done->user, ring->depth) ? done->user : 0];
        if (!WITHIN(done->user, ring->depth) || !WITHIN(read->ticket, ring->tickets_count)) return -EPROTO;
        read->result = done->result;
        if (read->result == read->length) {
            ring->tickets[read->ticket].left--;
            ring->tickets[read->ticket].bytes += read->length;
        } else
            ring->failed[failed++] = *read;
        read->ticket = NOBODY;
        ring->free[ring->room++] = (int64_t)done->user;
    }
    __atomic_store_n(ring->cq_head, tail, __ATOMIC_RELEASE);
    return failed;
}

#else /* a library that has every function, though no system but Linux has io_uring */

EXPORT int64_t kvswap_ring_submit(void) { return ENOSYS; }
EXPORT int64_t kvswap_ring_collect(void) { return -ENOSYS; }

#endif
