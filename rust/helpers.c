// SPDX-License-Identifier: GPL-2.0
/*
 * Inline functions and macros of the kernel, made callable from Rust; and the
 * removal of folios, which consists of little else.
 *
 * The unsafe side (rust/ out of tree).
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

/* What vma_start_pgoff() of 7.3 returns, by means that 7.2 has as well. */
static inline pgoff_t devanon_vma_first(struct vm_area_struct *vma)
{
	return vma_last_pgoff(vma) + 1 - vma_pages(vma);
}

/* The tree of mm/interval_tree.c, whose functions are not exported to modules. */
INTERVAL_TREE_DEFINE(struct vm_area_struct, shared.rb, unsigned long,
		     shared.rb_subtree_last, devanon_vma_first, vma_last_pgoff,
		     static inline, devanon_i_mmap)

/*
 * Make a shmem file on the kernel's internal mount; its pages are accounted one
 * by one. Whatever vm.memfd_noexec says, the file is not executable: its content
 * would not outlive the last process that runs it.
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
 * Count the pages of @inode in memory and in swap. shmem's own sum of both lags
 * behind when reclaim drops pages that were never written.
 */
void devanon_shmem_pages(struct inode *inode, unsigned long *resident,
			 unsigned long *swapped)
{
	/* Pages that other tasks add or remove meanwhile may be missed. */
	*resident = data_race(inode->i_mapping->nrpages);
	/* Likewise for pages that go to or come from swap. */
	*swapped = data_race(SHMEM_I(inode)->swapped);
}

/*
 * Make shmem recount the pages of @file, as any stat(2) does, after the driver
 * removed some. May sleep. The caller holds locks that i_rwsem must not be taken
 * under; shmem_getattr() of 7.2 and 7.3 takes only info->lock.
 */
void devanon_shmem_recount(struct file *file)
{
	struct kstat stat;

	vfs_getattr_nosec(&file->f_path, &stat, STATX_BLOCKS, AT_STATX_DONT_SYNC);
}

/*
 * Set what open(2) would have set. shmem_file_setup() makes files that are only
 * meant to be mapped.
 */
void devanon_file_set_seekable(struct file *file)
{
	file->f_mode |= FMODE_LSEEK | FMODE_PREAD | FMODE_PWRITE;
	file->f_flags |= O_LARGEFILE;
}

/* The first and the last page of its file that @vma covers. */
void devanon_vma_range(struct vm_area_struct *vma, pgoff_t *first, pgoff_t *last)
{
	*first = devanon_vma_first(vma);
	*last = vma_last_pgoff(vma);
}

/* A function or a macro, depending on whether the kernel is preemptible. */
void devanon_synchronize_rcu_tasks(void)
{
	synchronize_rcu_tasks();
}

/* Return true if invalidate_lock is held, shared or for writing. Does not sleep. */
bool devanon_invalidate_locked(struct address_space *mapping)
{
	return rwsem_is_locked(&mapping->invalidate_lock);
}

/* The most VMAs to visit in the tree while i_mmap_rwsem is held. */
#define DEVANON_MAX_STEPS 1024

/*
 * Return true if a VMA covers page @first. Lower *@last to the last page known to
 * have the same coverage. A covered run is not followed beyond @enough. Takes
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
		/* The tree yields VMAs in the order of their first pages. */
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
 * Set *@first to the first page in [*@first, @last] that has a folio or is in
 * swap; if @swapped, to the first that is in swap. Return false if there is none.
 * Does not sleep.
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
 * Fill @fbatch with folios from page *@index on, with a reference each. Stop after
 * a large folio, which may be split meanwhile, and before a swap entry. If a swap
 * entry comes first, set *@index to its page and return true. Does not sleep.
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

/*
 * Return true if no VMA covers any page of @folio. Set *@straddling if VMAs cover
 * only a part of it, or too many VMAs cover it to tell.
 */
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
 * Of the @nr locked @folios, remove those that lie in [@first, @last] and that no
 * VMA covers. Unlock all. *@next is the page where the search for the first of
 * them began; advance it past the last of them and return true. If some have left
 * the page cache, advance it only past those before the first such folio, and
 * return false. Set *@straddling if a folio lies only partly in the range or may
 * be only partly covered.
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
			/* Swapped out, or collapsed into a huge folio. */
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
		/* The folios are in the order of their indices. */
		if (!inside)
			low = folio->index;
		high = end;
		inside |= BIT(i);
	}

	/* One lookup for all of them, in the common case. */
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
 * Remove from the page cache the folios in [*@first, @last] that no VMA covers, up
 * to the first swap entry. If there is one, set *@first to its page and return
 * true. Set *@straddling if a folio was left that lies only partly in the range or
 * may be only partly covered. May sleep.
 *
 * Coverage is rechecked with the folio locked. A mapper locks the folio after its
 * VMA has entered the tree, so the mapper either keeps the folio or finds a hole.
 * A writer locks the folio as well.
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

		/* Wait for the first lock, then take as many more as are free. */
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
