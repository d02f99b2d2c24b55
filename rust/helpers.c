// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros of the kernel, made callable from Rust; and the
 * removal of folios, which is made of little else.
 */
#include <linux/fcntl.h>
#include <linux/folio_batch.h>
#include <linux/fs.h>
#include <linux/interval_tree_generic.h>
#include <linux/mm.h>
#include <linux/pagemap.h>
#include <linux/rcupdate.h>
#include <linux/rwsem.h>
#include <linux/shmem_fs.h>
#include <linux/xarray.h>

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

/*
 * A shmem file of the kernel's internal mount; pages are accounted one by one.
 * Not to be executed, whatever vm.memfd_noexec says: its content would not
 * outlive the last process that runs it.
 */
struct file *devanon_shmem_file_setup(const char *name, loff_t size)
{
	struct file *file;

	file = shmem_file_setup(name, size, mk_vma_flags(VMA_NORESERVE_BIT));
	if (!IS_ERR(file)) {
		struct inode *inode = file_inode(file);

		inode->i_mode &= ~0111;
		SHMEM_I(inode)->seals |= F_SEAL_EXEC;
	}

	return file;
}

/*
 * Pages of @inode in memory and in swap. shmem's own sum of both lags behind when
 * reclaim drops pages that were never written.
 */
void devanon_shmem_pages(struct inode *inode, unsigned long *resident,
			 unsigned long *swapped)
{
	/* What other tasks add or remove meanwhile may be counted or not. */
	*resident = data_race(inode->i_mapping->nrpages);
	/* As above. */
	*swapped = data_race(SHMEM_I(inode)->swapped);
}

/*
 * Have shmem count the pages of @file anew, as any stat(2) does: others removed
 * some. May sleep. shmem_getattr() takes info->lock and no other, in 7.2 and 7.3:
 * the caller holds locks that i_rwsem must not be taken under.
 */
void devanon_shmem_recount(struct file *file)
{
	struct kstat stat;

	vfs_getattr_nosec(&file->f_path, &stat, STATX_BLOCKS, AT_STATX_DONT_SYNC);
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

/* A function or a macro, as the kernel is preemptible or not. */
void devanon_synchronize_rcu_tasks(void)
{
	synchronize_rcu_tasks();
}

/* Whether anybody has invalidate_lock, shared or for writing. Does not sleep. */
bool devanon_invalidate_locked(struct address_space *mapping)
{
	return rwsem_is_locked(&mapping->invalidate_lock);
}

/* Steps in the tree under one i_mmap_rwsem. */
#define DEVANON_MAX_STEPS 1024

/*
 * Whether a VMA covers page @first. @last is lowered to the last page of which
 * the same is known. Covered pages after @enough are not looked for. Takes
 * i_mmap_rwsem for reading; may sleep.
 */
bool devanon_covered(struct address_space *mapping, pgoff_t first, pgoff_t enough,
		     pgoff_t *last)
{
	struct vm_area_struct *vma;
	pgoff_t vma_first, vma_last, end;
	bool covered = false;
	int steps = DEVANON_MAX_STEPS;

	i_mmap_lock_read(mapping);
	vma = devanon_i_mmap_iter_first(&mapping->i_mmap, first, *last);
	if (vma) {
		devanon_vma_range(vma, &vma_first, &vma_last);
		covered = vma_first <= first;
		end = covered ? vma_last : vma_first - 1;
		/* VMAs come in the order of their first pages. */
		while (covered && end < min(enough, *last) && --steps) {
			vma = devanon_i_mmap_iter_next(vma, first, *last);
			if (!vma)
				break;
			devanon_vma_range(vma, &vma_first, &vma_last);
			if (vma_first > end + 1)
				break;
			end = max(end, vma_last);
		}
		*last = min(end, *last);
	}
	i_mmap_unlock_read(mapping);
	cond_resched_tasks_rcu_qs();

	return covered;
}

/*
 * The first page in [@first, @last] that has a folio or is in swap; if @swapped,
 * that is in swap. Does not sleep.
 */
bool devanon_next_page(struct address_space *mapping, bool swapped,
		       pgoff_t *first, pgoff_t last)
{
	XA_STATE(xas, &mapping->i_pages, *first);
	void *entry;

	rcu_read_lock();
	xas_for_each(&xas, entry, last) {
		if (xas_retry(&xas, entry) || (swapped && !xa_is_value(entry)))
			continue;
		*first = max(*first, xas.xa_index);
		break;
	}
	rcu_read_unlock();

	return entry;
}

/*
 * Find folios from page *@index on, up to a large one, which may be split behind
 * our back, or to the first entry in swap. If that comes before all folios, the
 * answer is true, and *@index is its page. The folios in @fbatch have a reference
 * each. Does not sleep.
 */
static bool devanon_find_folios(struct address_space *mapping, pgoff_t *index,
				pgoff_t last, struct folio_batch *fbatch)
{
	XA_STATE(xas, &mapping->i_pages, *index);
	bool swapped = false;
	void *entry;

	rcu_read_lock();
	xas_for_each(&xas, entry, last) {
		struct folio *folio = entry;

		if (xas_retry(&xas, entry))
			continue;
		if (xa_is_value(entry)) {
			swapped = !folio_batch_count(fbatch);
			break;
		}
		if (!folio_try_get(folio))
			goto again;
		if (xas_reload(&xas) != entry) {
			folio_put(folio);
			goto again;
		}
		if (!folio_batch_add(fbatch, folio) || folio_test_large(folio))
			break;
		continue;
again:
		xas_reset(&xas);
	}
	if (swapped)
		*index = max(xas.xa_index, *index);
	rcu_read_unlock();

	return swapped;
}

/* Whether no VMA covers any page of @folio. @straddling is set if one covers some. */
static bool devanon_folio_uncovered(struct address_space *mapping, struct folio *folio,
				    bool *straddling)
{
	pgoff_t folio_last = folio_next_index(folio) - 1, end = folio_last;
	bool covered = devanon_covered(mapping, folio->index, folio_last, &end);

	if (end < folio_last)
		*straddling = true;
	return !covered && end == folio_last;
}

/*
 * Remove those of the @nr folios, all locked, that lie in the range and are not
 * covered, and unlock them all. *@next, where the first of them was looked for,
 * becomes where to look next: after the last of them, or before the first that is
 * not there any more. In that case the answer is false. @straddling is set if a
 * folio lies in the range in part, or is covered in part.
 */
static bool devanon_remove_locked(struct address_space *mapping, struct folio **folios,
				  unsigned int nr, pgoff_t first, pgoff_t last, pgoff_t *next,
				  bool *straddling)
{
	pgoff_t low = first, high = last, end;
	bool none_covered, all_present = true;
	unsigned long inside = 0;
	unsigned int i;

	BUILD_BUG_ON(FOLIO_BATCH_SIZE > BITS_PER_LONG);

	for (i = 0; i < nr; i++) {
		struct folio *folio = folios[i];

		if (folio->mapping != mapping) {
			/* Swapped out, or a part of a huge one by now. */
			all_present = false;
			continue;
		}
		end = folio_next_index(folio) - 1;
		if (all_present)
			*next = end + 1;
		if (folio->index < first || end > last) {
			*straddling = true;
			continue;
		}
		/* They come in the order of their indices. */
		if (!inside)
			low = folio->index;
		high = end;
		inside |= BIT(i);
	}

	/* One question for all, as a rule. */
	end = high;
	none_covered = inside && !devanon_covered(mapping, low, end, &end) && end == high;

	for (i = 0; i < nr; i++) {
		struct folio *folio = folios[i];

		if (inside & BIT(i)) {
			if (none_covered || devanon_folio_uncovered(mapping, folio, straddling))
				generic_error_remove_folio(mapping, folio);
		}
		folio_unlock(folio);
	}

	return all_present;
}

/*
 * Remove from the page cache the folios from page *@first to @last that no VMA
 * covers, up to the first entry in swap. If there is one, the answer is true, and
 * *@first is its page. @straddling is set if a folio was met, and left, that lies
 * in the range in part, or is covered in part.
 *
 * Who covers it is asked with the folio locked: whoever maps a folio, or writes
 * to it, has it locked as well, and is in the tree before he maps it. So nobody
 * who comes in time loses it, and nobody who comes later finds it. May sleep.
 */
bool devanon_remove_uncovered(struct address_space *mapping, pgoff_t *first, pgoff_t last,
			      bool *straddling)
{
	struct folio_batch fbatch;
	pgoff_t index = *first;
	unsigned int nr;
	bool swapped;

	folio_batch_init(&fbatch);
	while (!(swapped = devanon_find_folios(mapping, &index, last, &fbatch)) &&
	       (nr = folio_batch_count(&fbatch))) {
		unsigned int done = 0;
		bool all_present;

		/* Wait for one lock, and take what can be had besides. */
		do {
			unsigned int locked = done;

			folio_lock(fbatch.folios[locked++]);
			while (locked < nr && folio_trylock(fbatch.folios[locked]))
				locked++;
			all_present = devanon_remove_locked(mapping, fbatch.folios + done,
							    locked - done, *first, last, &index,
							    straddling);
			done = locked;
		} while (all_present && done < nr);
		folio_batch_release(&fbatch);
		cond_resched_tasks_rcu_qs();
	}
	*first = index;

	return swapped;
}
