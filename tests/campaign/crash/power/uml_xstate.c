/* Preloaded into User-Mode Linux where the processor has AMX.
 *
 * The registers of a guest's process are set with PTRACE_SETREGSET, which takes the whole area that the processor saves and
 * nothing shorter. User-Mode Linux of that age knows the first 2,696 bytes of it; here the rest is added as it is.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/uio.h>

static long (*next)(enum __ptrace_request, ...);
static char area[65536] __attribute__((aligned(64))); /* not on the stack: the guest's kernel has a small one */

__attribute__((constructor)) static void find(void)
{
    next = (long (*)(enum __ptrace_request, ...))dlsym(RTLD_NEXT, "ptrace");
}

long ptrace(enum __ptrace_request request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    int pid = va_arg(arguments, int);
    void *kind = va_arg(arguments, void *);
    struct iovec *given = va_arg(arguments, void *);
    va_end(arguments);
    struct iovec whole = {area, sizeof area};
    if (request == PTRACE_SETREGSET && kind == (void *)NT_X86_XSTATE) {
        if (next(PTRACE_GETREGSET, pid, kind, &whole))
            return -1;
        if (given->iov_len < whole.iov_len) {
            memcpy(area, given->iov_base, given->iov_len);
            given = &whole;
        }
    }
    return next(request, pid, kind, given);
}
