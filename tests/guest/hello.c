/* SPDX-License-Identifier: GPL-2.0 */
/* Compiled and run in a guest: sorts some numbers and prints a known checksum. */
#include <stdio.h>
#include <stdlib.h>

#define NUMBERS 100000

static int compare(const void *a, const void *b)
{
	unsigned int first = *(const unsigned int *)a;
	unsigned int second = *(const unsigned int *)b;

	return first < second ? -1 : first > second;
}

int main(void)
{
	unsigned int *numbers = malloc(NUMBERS * sizeof(*numbers));
	unsigned int seed = 1, sum = 0, i;

	if (!numbers)
		return 1;
	for (i = 0; i < NUMBERS; i++) {
		seed = seed * 1103515245 + 12345;
		numbers[i] = seed >> 8;
	}
	qsort(numbers, NUMBERS, sizeof(*numbers), compare);
	for (i = 0; i < NUMBERS; i++)
		sum = sum * 31 + numbers[i];
	printf("%u\n", sum);
	return 0;
}
