/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/anon: anonymous pages that go back to the host when unmapped.
 *
 * The device itself needs no header: open(2) and mmap(2) are its interface.
 * This header describes its one ioctl.
 */
#ifndef _UAPI_LINUX_DEVANON_H
#define _UAPI_LINUX_DEVANON_H

#include <linux/ioctl.h>
#include <linux/types.h>

/*
 * Version of this header. Every addition increments it; nothing is ever removed
 * or given a new meaning. It tells what a program was compiled with. The errors
 * below tell what the driver supports.
 */
#define DEVANON_UAPI_VERSION	1

/* struct devanon_new, flags */
#define DEVANON_CLOEXEC		(1U << 0)	/* set FD_CLOEXEC on the new descriptor */

/**
 * struct devanon_new - argument of DEVANON_IOC_NEW
 * @flags: DEVANON_* flags; unknown ones are refused
 * @reserved: must be 0
 */
struct devanon_new {
	__u32 flags;
	__u32 reserved;
};

/*
 * DEVANON_IOC_NEW - make a new anonymous file
 *
 * The file is like that of memfd_create(2): readable and writable, of size 0,
 * for read(2), write(2), lseek(2), ftruncate(2), fallocate(2), fstat(2) and
 * mmap(2). It can be neither executed (PROT_EXEC mappings can) nor sealed.
 * Unlike with a memfd, a page is freed, and its data lost, when the last mapping
 * that covers it goes away. Data that was only ever written with write(2) stays
 * until it is mapped and unmapped, or the file goes away.
 *
 * Any descriptor of /dev/anon will do. The new file shares nothing with it, and
 * may outlive it.
 *
 * Returns the new descriptor, or -1 and errno:
 *   EFAULT  the argument cannot be read
 *   EINVAL  an unknown flag, or reserved is not 0
 *   EMFILE, ENFILE  too many descriptors or files are open
 *   ENOMEM  out of memory
 *   ENOTTY  the driver does not know this command
 */
#define DEVANON_IOC_NEW		_IOW(0xDA, 0x01, struct devanon_new)

#endif /* _UAPI_LINUX_DEVANON_H */
