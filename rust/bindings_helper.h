/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Input of bindgen: what the kernel crate's own bindings lack. Kbuild lists the
 * names that are taken from it.
 */
#include <linux/shmem_fs.h>
#include <uapi/linux/devanon.h>

#include "helpers.h"
