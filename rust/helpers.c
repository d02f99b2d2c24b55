// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros of the kernel, made callable from Rust.
 */
#include <linux/fs.h>
#include <linux/interval_tree_generic.h>
#include <linux/mm.h>
#include <linux/shmem_fs.h>

#include "helpers.h"

/* vma_start_pgoff(), which is in 7.3, by way of what is in 7.2 as well. */
static inline pgoff_t devanon_vma_first(struct vm_area_struct *vma)
{
	return vma_last_pgoff(vma) + 1 - vma_pages(vma);
}

/* The tree of mm/interval_tree.c, whose functions modules cannot call. */
INTERVAL_TREE_DEFINE(struct vm_area_struct, shared.rb, unsigned long,
		     shared.rb_subtree_last, devanon_vma_first, vma_last_pgoff,
		     static inline, devanon_i_mmap)

/* A shmem file of the kernel's internal mount; pages are accounted one by one. */
struct file *devanon_shmem_file_setup(const char *name, loff_t size)
{
	return shmem_file_setup(name, size, mk_vma_flags(VMA_NORESERVE_BIT));
}

/*
 * Pages of @inode in memory and in swap. shmem's own sum of both lags behind when
 * reclaim drops pages that were never written.
 */
void devanon_shmem_pages(struct inode *inode, unsigned long *resident,
			 unsigned long *swapped)
{
	struct shmem_inode_info *info = SHMEM_I(inode);

	spin_lock(&info->lock);
	*resident = READ_ONCE(inode->i_mapping->nrpages);
	*swapped = info->swapped;
	spin_unlock(&info->lock);
}

/* What open(2) would have set: shmem_file_setup() makes files for mapping only. */
void devanon_file_set_seekable(struct file *file)
{
	file->f_mode |= FMODE_LSEEK | FMODE_PREAD | FMODE_PWRITE;
	file->f_flags |= O_LARGEFILE;
}

/* The pages of its file that @vma covers. */
void devanon_vma_range(struct vm_area_struct *vma, pgoff_t *first, pgoff_t *last)
{
	*first = devanon_vma_first(vma);
	*last = vma_last_pgoff(vma);
}

/*
 * The VMA with the lowest first page among those that cover a page in
 * [@first, @last]. Takes i_mmap_rwsem for reading; may sleep.
 */
bool devanon_first_covered(struct address_space *mapping, pgoff_t first,
			   pgoff_t last, pgoff_t *vma_first,
			   pgoff_t *vma_last)
{
	struct vm_area_struct *vma;

	i_mmap_lock_read(mapping);
	vma = devanon_i_mmap_iter_first(&mapping->i_mmap, first, last);
	if (vma)
		devanon_vma_range(vma, vma_first, vma_last);
	i_mmap_unlock_read(mapping);

	return vma;
}
