# Looking for the next packet for a moment, before sleeping until it comes. Decides; the clock is the
# caller's.
#
# To wake a sleeping thread costs the waker an interrupt to another CPU, and the packet tens of
# microseconds. So while packets follow closely, the pump looks for the next one before it sleeps, and
# lets others run between two looks. It does not where that does not pay: when packets are further
# apart, and when CPUs are scarce. That shows in looks that lie far apart: somebody else ran between.

from libc.stdint cimport int64_t


cdef enum:
    CLOSE_NS = 100_000  # packets no further apart follow closely; nor is one looked for any longer
    TAKEN_NS = 20_000   # looks that lie this far apart: another thread had the CPU between them


cdef struct Spin:
    bint on
    bint closely        # the last packet followed closely
    int64_t began       # this wait
    int64_t looked      # the last time, in this wait


cdef inline bint spin_begin(Spin *spin, int64_t now) noexcept nogil:
    """A wait begins; whether to look instead of sleeping."""
    spin.began = now
    spin.looked = now
    return spin.on and spin.closely


cdef inline bint spin_again(Spin *spin, int64_t now) noexcept nogil:
    """Nothing was there, and others were let run; whether to look once more."""
    cdef bint taken = now - spin.looked > TAKEN_NS
    spin.looked = now
    return not taken and now - spin.began < CLOSE_NS


cdef inline void spin_end(Spin *spin, int64_t now, bint came) noexcept nogil:
    """The wait is over, with a packet or without."""
    spin.closely = came and now - spin.began < CLOSE_NS
