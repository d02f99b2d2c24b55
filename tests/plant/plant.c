// SPDX-License-Identifier: GPL-2.0
/*
 * Trouble for the test of the harness (tools/vm/tests/outcomes.rs) to find,
 * since no stock kernel makes it to order. Never installed.
 */

#include <linux/delay.h>
#include <linux/module.h>

static bool warn;
module_param(warn, bool, 0);
MODULE_PARM_DESC(warn, "a WARN()");

static bool hang;
module_param(hang, bool, 0);
MODULE_PARM_DESC(hang, "a minute in uninterruptible sleep");

static int __init plant_init(void)
{
	WARN(warn, "planted\n");
	if (hang)
		msleep(60 * MSEC_PER_SEC);
	return 0;
}
module_init(plant_init);

MODULE_DESCRIPTION("Planted trouble");
MODULE_LICENSE("GPL");
