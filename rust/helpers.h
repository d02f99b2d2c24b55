/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the driver needs from the kernel that only inline functions and macros
 * provide. The unsafe side (rust/ out of tree).
 */
#ifndef _DEVANON_HELPERS_H
#define _DEVANON_HELPERS_H

#include <linux/fs.h>
#include <linux/mm_types.h>

struct file *devanon_shmem_file_setup(const char *name, loff_t size);
void devanon_shmem_pages(struct inode *inode, unsigned long *resident,
			 unsigned long *swapped);
void devanon_shmem_recount(struct file *file);
void devanon_file_set_seekable(struct file *file);
void devanon_synchronize_rcu_tasks(void);
void devanon_vma_range(struct vm_area_struct *vma, pgoff_t *first, pgoff_t *last);
bool devanon_invalidate_locked(struct address_space *mapping);
bool devanon_covered(struct address_space *mapping, pgoff_t first, pgoff_t enough,
		     pgoff_t *last);
bool devanon_next_page(struct address_space *mapping, bool swapped,
		       pgoff_t *first, pgoff_t last);
bool devanon_remove_uncovered(struct address_space *mapping, pgoff_t *first,
			      pgoff_t last, bool *straddling);

#endif /* _DEVANON_HELPERS_H */
