"""The words of the segment, and what C and the system do with them: a part of compiled.pyx."""

from cpython.pythread cimport (
    NOWAIT_LOCK,
    PyThread_acquire_lock,
    PyThread_allocate_lock,
    PyThread_free_lock,
    PyThread_get_thread_ident,
    PyThread_release_lock,
    PyThread_type_lock,
)
from libc.stdint cimport int64_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy, memset

from ..segment import layout
from ..segment.semaphores import CLOCKWAIT_ADDRESS
from .mutex import ORDERED_STORES, RECEIVER_HOLD, SLICE
from .waiters import IDLE_SLICE, IDLE_SLICES, SHORT_SLICE

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <math.h>
    #include <sched.h>
    #include <semaphore.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/stat.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>
    #ifdef __SSE2__
    #include <emmintrin.h>
    #endif

    #define LOAD(word) __atomic_load_n((word), __ATOMIC_ACQUIRE)
    #define STORE(word, value) __atomic_store_n((word), (value), __ATOMIC_RELEASE)
    #define STORE_BYTE(byte, value) __atomic_store_n((byte), (char) (value), __ATOMIC_RELEASE)
    #define FENCE() __atomic_thread_fence(__ATOMIC_SEQ_CST)

    /* Where the threads of a process run at once, locks keep them apart; under the GIL there is nothing to do. A local
       lock is that of a mutex, which Python's threads take, too (LocalLock). Its holder needs microseconds, unless it
       is in Python, or has no core. A guard is held for some instructions, at which no thread of CPython's can be stopped:
       so none is held where the process is forked, as a lock of CPython's may be. */
    #ifdef Py_GIL_DISABLED
    #define THREADS_AT_ONCE 1
    static int take_local(PyThread_type_lock lock) {
        for (int tries = 0; tries < 100; tries++) {
            if (PyThread_acquire_lock(lock, NOWAIT_LOCK)) return 1;
    #ifdef __SSE2__
            _mm_pause();
    #endif
        }
        return 0;
    }
    #define TAKE_LOCAL(lock) take_local(lock)
    #define GIVE_LOCAL(lock) PyThread_release_lock(lock)
    typedef char Guard;
    static void GUARD(Guard *guard) {
        for (int tries = 1; __atomic_test_and_set(guard, __ATOMIC_ACQUIRE); tries++)
            if (tries % 100 == 0) sched_yield();
    }
    #define UNGUARD(guard) __atomic_clear((guard), __ATOMIC_RELEASE)
    #define ITEM(list, at) PyList_GetItemRef(list, at)
    #else
    #define THREADS_AT_ONCE 0
    #define TAKE_LOCAL(lock) 1
    #define GIVE_LOCAL(lock) ((void) 0)
    typedef char Guard;
    #define GUARD(guard) ((void) 0)
    #define UNGUARD(guard) ((void) 0)
    static PyObject *ITEM(PyObject *list, Py_ssize_t at) {
        PyObject *item = PyList_GET_ITEM(list, at);
        Py_INCREF(item);
        return item;
    }
    #endif

    static double monotonic(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec + now.tv_nsec * 1e-9;
    }

    static uint64_t monotonic_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * UINT64_C(1000000000) + now.tv_nsec;
    }

    /* What is built with a new glibc shall also run with an older one, down to 2.28. 2.34 has moved the semaphores, and
       knows them by two versions, of which older ones have the first; fstat is a function of its own since 2.33. */
    #define STAT(fd, status) fstat(fd, status)
    #if defined __GLIBC_PREREQ && (defined __x86_64__ || defined __aarch64__)
    #if __GLIBC_PREREQ(2, 34)
    #ifdef __x86_64__
    #define FIRST "GLIBC_2.2.5"
    #else
    #define FIRST "GLIBC_2.17"
    #endif
    __asm__(".symver sem_trywait, sem_trywait@" FIRST);
    __asm__(".symver sem_post, sem_post@" FIRST);
    __asm__(".symver sem_getvalue, sem_getvalue@" FIRST);
    #undef STAT
    #define STAT(fd, status) syscall(SYS_fstat, fd, status)
    #endif
    #endif

    /* Take a token before that time; 0, or why not. sem_clockwait is not linked, since glibc has it from 2.30 on. */
    static int (*clockwait)(sem_t *, clockid_t, const struct timespec *);
    static void find_clockwait(uintptr_t address) {
        clockwait = (int (*)(sem_t *, clockid_t, const struct timespec *)) address;
    }
    static int wait_until(sem_t *semaphore, double seconds) {
        struct timespec until;
        until.tv_sec = (time_t) seconds;
        until.tv_nsec = (long) ((seconds - until.tv_sec) * 1e9);
        return clockwait(semaphore, CLOCK_MONOTONIC, &until) ? errno : 0;
    }
    static int can_wait(void) { return clockwait != NULL; }

    /* memcpy past the caches: it need not read the lines that it overwrites. Its stores are visible when it returns. */
    static void stream(char *to, const char *from, size_t nbytes) {
        size_t at = -(uintptr_t) to & 15;
        memcpy(to, from, at);
    #ifdef __SSE2__
        for (; at + 64 <= nbytes; at += 64)
            for (int k = 0; k < 64; k += 16)
                _mm_stream_si128((__m128i *) (to + at + k), _mm_loadu_si128((const __m128i *) (from + at + k)));
        _mm_sfence();
    #endif
        memcpy(to + at, from + at, nbytes - at);
    }

    /* Whether another process holds that byte of a file, as segment/locks.py asks; not if there is no answer. */
    static int locked_elsewhere(int fd, uint64_t byte) {
        struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t) byte, .l_len = 1};
        return fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type != F_UNLCK;
    }

    static int leads_to(int fd, uint64_t device, uint64_t inode) {
        struct stat status;
        return STAT(fd, &status) == 0 && status.st_dev == device && status.st_ino == inode;
    }

    /* Whether this process still holds that byte: LockedFile.holds. */
    static int holds(int fd, int lock_fd, uint64_t byte, uint64_t device, uint64_t inode) {
        return (!leads_to(fd, device, inode) || locked_elsewhere(fd, byte)) && !locked_elsewhere(lock_fd, byte)
            && leads_to(lock_fd, device, inode);
    }
    """
    ctypedef struct sem_t:
        pass
    int sem_trywait(sem_t *) nogil
    int sem_post(sem_t *) nogil
    int sem_getvalue(sem_t *, int *) nogil
    uint64_t LOAD(uint64_t *) nogil
    void STORE(uint64_t *, uint64_t) nogil
    void STORE_BYTE(char *, uint64_t) nogil
    void FENCE() nogil
    double monotonic() nogil
    uint64_t monotonic_ns() nogil
    int wait_until(sem_t *, double) nogil
    bint can_wait()
    void find_clockwait(uintptr_t)
    void stream(char *, const char *, size_t) nogil
    bint locked_elsewhere(int, uint64_t)
    bint holds(int, int, uint64_t, uint64_t, uint64_t)
    int sched_yield() nogil
    ctypedef enum PyLockStatus:
        PY_LOCK_ACQUIRED
    PyLockStatus PyThread_acquire_lock_timed(PyThread_type_lock, long long, int) nogil
    ctypedef char Guard
    bint THREADS_AT_ONCE
    bint TAKE_LOCAL(PyThread_type_lock)
    void GIVE_LOCAL(PyThread_type_lock)
    void GUARD(Guard *)
    void UNGUARD(Guard *)
    object ITEM(list, Py_ssize_t)  # an item of a list that other threads may change
    int EINTR
    double INFINITY

find_clockwait(CLOCKWAIT_ADDRESS)

# --- as layout.py has them

cdef uint64_t GEN = layout.GEN, TAIL = layout.TAIL, HEAD = layout.HEAD, NEWEST = layout.NEWEST
cdef uint64_t ATTENTION = layout.ATTENTION, SHUTDOWN = layout.SHUTDOWN, HIGH_WATER = layout.HIGH_WATER
cdef uint64_t SENT_NBYTES = layout.SENT_NBYTES, TAKEN_NBYTES = layout.TAKEN_NBYTES
cdef uint64_t MESSAGE_HINT = layout.MESSAGE_HINT, SPACE_HINT = layout.SPACE_HINT, LISTENED = layout.LISTENED
cdef uint64_t LAST_CHECK = layout.LAST_CHECK, LOCK_ENTRIES = layout.LOCK_ENTRIES, PIN_CELLS = layout.PIN_CELLS

cdef uint64_t ENTRY_WORDS = layout.ENTRY_WORDS, MAX_ENTRIES = layout.MAX_ENTRIES
cdef uint64_t P_STATUS = layout.P_STATUS, IN_USE = layout.IN_USE, P_CALLED = layout.P_CALLED
cdef uint64_t P_INCARNATION = layout.P_INCARNATION, INCARNATION_SHIFT = layout.INCARNATION_SHIFT
cdef uint64_t P_SENDER_HOLD = layout.P_SENDER_HOLD, P_RECEIVER_HOLD = RECEIVER_HOLD
cdef bint ORDERED = ORDERED_STORES
cdef uint64_t P_SENDERS = layout.P_SENDERS, P_UNDECIDED = layout.P_UNDECIDED
cdef uint64_t P_RECEIVERS = layout.P_RECEIVERS, P_MAY_RECEIVE = layout.P_MAY_RECEIVE
cdef uint64_t P_WAITING_MESSAGE = layout.P_WAITING_MESSAGE, P_WAITING_SPACE = layout.P_WAITING_SPACE
cdef uint64_t P_WAITING_EVENT = layout.P_WAITING_EVENT, P_WAITS = layout.P_WAITS

cdef uint64_t RECORD_WORDS = layout.RECORD_WORDS, R_SEQUENCE = layout.R_SEQUENCE, R_META = layout.R_META
cdef uint64_t R_SINCE = layout.R_SINCE, R_SENDER = layout.R_SENDER, R_DESCRIPTION = layout.R_DESCRIPTION
cdef uint64_t DESCRIPTION_NBYTES = layout.DESCRIPTION_NBYTES, SMALL_NBYTES = layout.SMALL_NBYTES
cdef uint64_t FREE = layout.FREE, READY = layout.READY, WRITING = layout.WRITING, READING = layout.READING
cdef uint64_t KEPT = layout.KEPT, TAKE = layout.TAKE, STATE_MASK = layout.STATE_MASK
cdef uint64_t DELIVERY = layout.DELIVERY, DELIVERY_MASK = layout.DELIVERY_MASK
cdef uint64_t MAX_WORD = layout.MAX_WORD, OWNER_MASK = layout.OWNER_MASK & layout.MAX_WORD

# --- how long a call waits

#: Seconds of a look at a word while spinning, as spin.py counts them; of a sleep, as steps.py has them.
cdef double LOOK = 30e-9, SLICE_SECONDS = SLICE, SHORT_SECONDS = SHORT_SLICE, IDLE_SECONDS = IDLE_SLICE
cdef int IDLE_ROUNDS = IDLE_SLICES
cdef long long SLICE_MICROSECONDS = int(SLICE * 1e6)
#: Of so many looks for the dead, one asks whether this process itself is still alive to others.
cdef int SELF_LOOKS = 4
