/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Input for bindgen: what the kernel crate's own bindings lack. Kbuild lists the
 * names to take from it. The unsafe side (rust/ out of tree).
 */
#include <linux/shmem_fs.h>
#include <uapi/linux/devanon.h>

#include "helpers.h"
