// SPDX-License-Identifier: GPL-2.0
/*
 * Planted bugs for the harness's own tests (tests/vm/tests) to detect, because
 * a working kernel has none to offer. Never installed.
 */

#include <linux/debug_locks.h>
#include <linux/delay.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

static bool warn;
module_param(warn, bool, 0);
MODULE_PARM_DESC(warn, "trigger a WARN()");

static bool hang;
module_param(hang, bool, 0);
MODULE_PARM_DESC(hang, "sleep uninterruptibly for a minute (hung task)");

static bool uaf;
module_param(uaf, bool, 0);
MODULE_PARM_DESC(uaf, "read freed memory (KASAN)");

static bool inversion;
module_param(inversion, bool, 0);
MODULE_PARM_DESC(inversion, "take two mutexes in both orders (lockdep)");

static bool atomic;
module_param(atomic, bool, 0);
MODULE_PARM_DESC(atomic, "take a mutex under a spinlock (DEBUG_ATOMIC_SLEEP)");

static bool leak;
module_param(leak, bool, 0);
MODULE_PARM_DESC(leak, "leak memory (kmemleak)");

static bool list;
module_param(list, bool, 0);
MODULE_PARM_DESC(list, "corrupt a list (DEBUG_LIST)");

static bool bounds;
module_param(bounds, bool, 0);
MODULE_PARM_DESC(bounds, "index past the end of an array (UBSAN)");

static bool race;
module_param(race, bool, 0);
MODULE_PARM_DESC(race, "increment a variable in two threads (KCSAN)");

static bool blind;
module_param(blind, bool, 0);
MODULE_PARM_DESC(blind, "turn lockdep off silently");

static DEFINE_MUTEX(mutex_a);
static DEFINE_MUTEX(mutex_b);
static DEFINE_SPINLOCK(lock);

static void plant_uaf(void)
{
	int *freed = kmalloc(64, GFP_KERNEL);

	if (!freed)
		return;
	kfree(freed);
	pr_info("planted: %d\n", READ_ONCE(*freed));
}

static void plant_inversion(void)
{
	mutex_lock(&mutex_a);
	mutex_lock(&mutex_b);
	mutex_unlock(&mutex_b);
	mutex_unlock(&mutex_a);

	mutex_lock(&mutex_b);
	mutex_lock(&mutex_a);
	mutex_unlock(&mutex_a);
	mutex_unlock(&mutex_b);
}

static void plant_atomic(void)
{
	spin_lock(&lock);
	mutex_lock(&mutex_a);
	mutex_unlock(&mutex_a);
	spin_unlock(&lock);
}

/* Leak several: a stale pointer somewhere may hide one. */
static void plant_leak(void)
{
	for (int i = 0; i < 10; i++)
		if (!kmalloc(64, GFP_KERNEL))
			return;
}

static void plant_list(void)
{
	LIST_HEAD(head);
	LIST_HEAD(stray);

	/* Add an entry between two that are not neighbours. */
	__list_add(&stray, &head, &stray);
}

static void plant_bounds(void)
{
	static int array[4];
	int index = ARRAY_SIZE(array);

	OPTIMIZER_HIDE_VAR(index);
	array[index] = 0;
}

static int counter;

static int count(void *unused)
{
	while (!kthread_should_stop()) {
		for (int i = 0; i < 1000; i++) {
			counter++;
			barrier();
		}
		cond_resched();
	}
	return 0;
}

static void plant_race(void)
{
	struct task_struct *threads[2];

	for (int i = 0; i < ARRAY_SIZE(threads); i++)
		threads[i] = kthread_run(count, NULL, "plant/%d", i);
	msleep(10 * MSEC_PER_SEC);
	for (int i = 0; i < ARRAY_SIZE(threads); i++)
		if (!IS_ERR(threads[i]))
			kthread_stop(threads[i]);
}

static int __init plant_init(void)
{
	WARN(warn, "planted\n");
	if (hang)
		msleep(60 * MSEC_PER_SEC);
	/* Before KASAN's report, which turns lockdep off. */
	if (inversion)
		plant_inversion();
	if (atomic)
		plant_atomic();
	if (uaf)
		plant_uaf();
	if (leak)
		plant_leak();
	if (list)
		plant_list();
	if (bounds)
		plant_bounds();
	if (race)
		plant_race();
	if (blind)
		debug_locks_off();
	return 0;
}
module_init(plant_init);

MODULE_DESCRIPTION("Planted bugs for the tests of the harness");
MODULE_LICENSE("GPL");
