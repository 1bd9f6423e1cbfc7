# Everything a person does with picovm's sources. Each target is one line in `make help`; the work is in make/.
#
# PICOVM_HOST   auto (default), direct or emulated: where demo, test and bench find KVM
# PICOVM_CACHE  what is costly to make again: kernels, images, tools  (default ~/.cache/picovm)
# PICOVM_HOME   the store; by default picovm's own for the demo, and $PICOVM_CACHE/store for tests and benchmarks
# PREFIX        where install puts things                             (default /usr/local)

PREFIX ?= /usr/local
export PREFIX DESTDIR

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test programs fuzz miri bench setup kernel build image images lint fmt doc install uninstall clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo 'Settings: PICOVM_HOST=auto|direct|emulated  PICOVM_CACHE=DIR  PICOVM_HOME=DIR  PREFIX=DIR'

demo: setup build image ## The main job: boot a real Debian once, fork clones that do real work; does all set-up
	@make/demo

test: ## Do all set-up, then run every test; the last line is "N passed, N failed"
	@tests/run-all

programs: setup build ## Run real programs in containers: Python's own tests, Redis, nginx, gcc... (docs/programs.md)
	@make/programs

fuzz: setup ## Fuzz what reads hostile input, for hours: FUZZ_SECONDS, FUZZ_TARGET, FUZZ_JOBS (fuzz/README.md)
	@make/fuzz

miri: ## Run the pure parses under Miri, where a nightly toolchain has it
	@make/miri

bench: setup build ## Measure boot, freeze, fork and run; the figures go to target/bench/report.json
	@make/bench

setup: ## Install the Debian packages that are missing (as root)
	@make/setup

kernel: ## Build the guest kernel, unless it is in the cache
	@make/step "guest kernel" guest-kernel/build

build: kernel ## Build every program, and the guest's files beside them
	@make/step "programs" cargo build --release --workspace --bins
	@make/step "guest files" make/guest-files

image: build ## Put a minimal Debian into the store, as the image "debian"
	@make/image

images: build ## Put that and Debians with Python, Redis, nginx and tools into the store
	@make/image python redis nginx tools

lint: ## Check format, clippy, shell scripts, and the dependencies' licences and sources
	@make/lint

fmt: ## Format the Rust sources
	@cargo fmt --all
	@cargo fmt --manifest-path fuzz/Cargo.toml

doc: ## Build the documentation of the libraries; a warning is an error
	@RUSTDOCFLAGS='-D warnings' make/step "documentation" cargo doc --workspace --no-deps

install: build ## Install picovm, the guest's files and shell completions under PREFIX
	@make/install

uninstall: ## Remove what install has put under PREFIX
	@make/install --remove

clean: ## Remove what was built here; the cache stays
	@make/step "removing target/" cargo clean
