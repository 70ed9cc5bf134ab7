# Two commands: `make run` and `make test`. Both install what is missing, build what they need, and can be repeated at will.
SHELL := /bin/bash
# On a machine with a GPU and nvcc 13 or newer the program is built for both, elsewhere for the CPU.
PRESET ?= $(shell tools/pick_preset.sh)
JOBS ?= $(shell nproc)

.PHONY: all deps build run test check clean

all: build

deps:
	@tools/install_deps.sh $(if $(filter cuda,$(PRESET)),--gpu)

build/$(PRESET)/build.ninja: | deps
	@cmake --preset $(PRESET) >/dev/null

# The program alone; `make test` builds the tests.
build: build/$(PRESET)/build.ninja
	@cmake --build --preset $(PRESET) --target hadal -j $(JOBS)
	@ln -sf build/$(PRESET)/hadal hadal

run: build
	@echo "hadal-nano goes on with the opening of Bleak House, which it was not trained on:"
	@./hadal generate --prompt "$$(cat models/hadal-nano/example.txt)" --max-tokens 200 --temperature 0.8 --top-p 0.95 --seed 7

test: build
	@cmake --build --preset $(PRESET) -j $(JOBS)
	@ctest --preset $(PRESET) -j $(JOBS)

check:
	@tools/check_layers.sh
	@tools/check_style.sh
	@tools/check_docs.py
	@tools/check_sizes.sh

clean:
	rm -rf build hadal
