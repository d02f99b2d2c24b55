# SPDX-License-Identifier: GPL-2.0
# kbuild reads Kbuild; this file is for people.

KDIR ?= /lib/modules/$(shell uname -r)/build
# Where the module is built: here, or with MO=DIR in DIR.
KBUILD = $(MAKE) -C $(KDIR) M=$(CURDIR) $(if $(MO),MO=$(MO))

.PHONY: help modules modules_install clean run test test-all test-one test-debug stress test-kcsan stress-uml stress-ubd demo-uml \
	demo-savings bench bench-compare kernel uml shell lint rust-analyzer distclean
.NOTPARALLEL:

help:
	@echo 'In a build environment of its own, made under build/ at first use (as root):'
	@echo '  make run             UML guests on /dev/anon in a VM: a table of the host memory they cost'
	@echo '  make test            the tests, on a stock Debian kernel and one with detectors'
	@echo '  make test-all        more: also another stock kernel and one with patches/host; KASAN'
	@echo '  make test-one TEST=NAME [KERNEL=LINE] [UML=SCENARIO]   one test or group alone; see scripts/test-one --help'
	@echo '  make test-debug      those that concern the kernel with KASAN, for longer'
	@echo '  make stress [SECONDS=N]   the race test alone, on the kernel with KASAN; 600 s by default'
	@echo '  make test-kcsan      the driver'"'"'s tests under the detector of data races'
	@echo '  make stress-uml      a Debian userland on UML, with each backing of its memory'
	@echo '  make stress-ubd      ubd=mmap: its tests in their long form, and a guest killed a hundred times'
	@echo '  make demo-uml        the life of a Debian guest: a picture, and figures with their goals'
	@echo '  make demo-savings [SHORT=1]   guests from one image until the host swaps: a table and a picture'
	@echo '  make bench           /dev/anon against its peers, counted in instructions: tables of ratios'
	@echo '  make bench-compare   the ratios that are worse than tests/bench/baseline.json by more than 2 %'
	@echo '  make uml             a UML with patches/uml, the guest'"'"'s kernel'
	@echo '  make kernel          a kernel with patches/host, /dev/anon built in'
	@echo '  make shell           a shell in a VM with the module loaded'
	@echo '  make lint            rustfmt, clippy, shellcheck, checkpatch, sparse, links of the docs'
	@echo '  make rust-analyzer   rust-project.json, for editors'
	@echo '  make distclean       remove build/'
	@echo 'With the tools of this machine:'
	@echo '  make modules [KDIR=DIR]          build devanon.ko; Debian needs scripts/rust-metadata first'
	@echo '  make modules_install [KDIR=DIR]  install it'
	@echo '  make clean [KDIR=DIR]            remove what make modules made'
	@echo 'On failure make exits with 2. The scripts of the same names in scripts/ have more exit statuses.'

modules:
	@test -e $(KDIR)/rust/libkernel.rmeta || { echo >&2 "$(KDIR) has no Rust metadata:" \
		"run scripts/rust-metadata, then make modules KDIR=/usr/src/linux-rust-$$(uname -r)"; exit 1; }
	$(KBUILD) devanon.o
	scripts/check-symbols $(or $(MO),$(CURDIR))/devanon.o $(KDIR)/Module.symvers
	$(KBUILD) modules

# Not signed: the distro keeps its key. Debian's KDIR has no System.map, without
# which kbuild leaves out depmod.
modules_install:
	$(KBUILD) CONFIG_MODULE_SIG_ALL= $@
	depmod -b "$(INSTALL_MOD_PATH)/" "$$(cat $(KDIR)/include/config/kernel.release)"

clean:
	$(KBUILD) $@

# The full log of each goal, including its preparation.
run test test-all test-one test-debug stress test-kcsan stress-uml stress-ubd demo-uml demo-savings bench kernel uml shell lint rust-analyzer: export DEVANON_LOG = $(CURDIR)/build/log/$@.log

run test test-kcsan stress-uml stress-ubd demo-uml demo-savings bench shell lint:
	@scripts/prepare $@
	@scripts/$@

bench-compare:
	@scripts/$@

test-all test-debug:
	@scripts/prepare $@
	@scripts/test $(@:test-%=%)

test-one:
	@[ -n '$(TEST)' ] || { echo >&2 'make test-one TEST=NAME; see scripts/test-one --help'; exit 1; }
	@KERNEL='$(KERNEL)' UML='$(UML)' scripts/prepare $@
	@scripts/test-one $(if $(KERNEL),--kernel '$(KERNEL)') $(if $(UML),--uml '$(UML)') '$(TEST)'

stress:
	@scripts/prepare $@
	@scripts/$@ $(or $(SECONDS),600)

kernel uml rust-analyzer:
	@scripts/prepare $@

distclean:
	rm -rf build
