/* Preloaded into a process, refuses those of its sendmmsg() messages and writev() calls that it is told to,
 * as a kernel might; all others go to the kernel. Attempts are numbered from 0, by what a rule looks at. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/udp.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/uio.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

enum which { ANY, WHOLE, PLAIN }; /* whole: a message that UDP_SEGMENT cuts, a frame that is a superframe */
enum { RULES = 8, VIRTIO_GSO_TYPE = 1 };

struct rule {
	int error;
	enum which which;
	long first;
	long times; /* -1: from then on always */
	long seen;
};

struct rules {
	struct rule rules[RULES];
	int count;
	long attempts;
};

static struct rules sends, writes;

static void add(struct rules *all, int error, int which, long first, long times)
{
	all->rules[all->count++] = (struct rule){ error, (enum which)which, first, times, 0 };
}

void refuse_sends(int error, int which, long first, long times) { add(&sends, error, which, first, times); }
void refuse_writes(int error, int which, long first, long times) { add(&writes, error, which, first, times); }
long send_attempts(void) { return sends.attempts; }
long write_attempts(void) { return writes.attempts; }

void refuse_nothing(void)
{
	sends = (struct rules){ 0 };
	writes = (struct rules){ 0 };
}

/* The errno to refuse this attempt with, 0 to let it through. */
static int refused(struct rules *all, int whole)
{
	int error = 0;
	all->attempts++;
	for (int i = 0; i < all->count; i++) {
		struct rule *rule = &all->rules[i];
		if (rule->which != ANY && (rule->which == WHOLE) != whole)
			continue;
		long number = rule->seen++;
		if (!error && number >= rule->first && (rule->times < 0 || number < rule->first + rule->times))
			error = rule->error;
	}
	return error;
}

static int is_cut(const struct msghdr *message)
{
	struct cmsghdr *control = CMSG_FIRSTHDR(message);
	for (; control; control = CMSG_NXTHDR((struct msghdr *)message, control))
		if (control->cmsg_level == IPPROTO_UDP && control->cmsg_type == UDP_SEGMENT)
			return 1;
	return 0;
}

/* As the kernel's: messages before the refused one are sent, and an error behind them is not told. */
int sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags)
{
	int (*real)(int, struct mmsghdr *, unsigned int, int) = dlsym(RTLD_NEXT, "sendmmsg");
	unsigned int let = 0;
	int error = 0;
	while (let < count && !(error = refused(&sends, is_cut(&messages[let].msg_hdr))))
		let++;
	if (!let && count) {
		errno = error;
		return -1;
	}
	return real(fd, messages, let, flags);
}

ssize_t writev(int fd, const struct iovec *pieces, int count)
{
	ssize_t (*real)(int, const struct iovec *, int) = dlsym(RTLD_NEXT, "writev");
	int whole = count > 0 && pieces[0].iov_len > VIRTIO_GSO_TYPE
		&& ((const unsigned char *)pieces[0].iov_base)[VIRTIO_GSO_TYPE] != 0;
	int error = refused(&writes, whole);
	if (error) {
		errno = error;
		return -1;
	}
	return real(fd, pieces, count);
}
