# Thin over cargo. `make run` needs nothing but a Rust toolchain and, for packages that are missing,
# root or sudo on a Debian system.

CARGO ?= cargo
TARGET := $(or $(CARGO_TARGET_DIR),target)
BERTH := $(TARGET)/release/berth

.PHONY: run test stress bench lint build packages

run: packages build
	scripts/run-guest $(BERTH)

# The agent first: it becomes part of every initramfs.
build:
	$(CARGO) xtask agent
	$(CARGO) build --release --package berth-cli

test: packages
	$(CARGO) xtask agent
	scripts/test

# Too slow for every change: programs that use the whole processor, and boots in a row.
stress: packages build
	$(CARGO) xtask stress
	$(CARGO) xtask boots

bench: packages build
	scripts/install-packages qemu-system-x86:qemu-system-x86_64
	$(BERTH) image bootstrap debian bookworm
	$(CARGO) xtask bench --json $(TARGET)/bench.json --plot $(TARGET)/bench.svg

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -Dwarnings
	$(CARGO) xtask tidy

packages:
	scripts/install-packages gcc:cc libc6-dev:/usr/include/stdio.h mmdebstrap:mmdebstrap \
		e2fsprogs:mke2fs passt:passt nftables:nft
