# make demo: street scenes, training, mIoU and a picture. make test: the tests. make lint: ruff.
# make gpu: what only a GPU can show, in pieces of 8 minutes. make gpu PART=layers: one part.
# make check: sizes of files, imports, public names, the README's length, the wheel.
# Each installs what it needs into .venv first. Another torch: make TORCH='torch>=2.6' ...
PYTHON ?= python3
TORCH ?= torch==2.13.0
# Each torchvision fits one build of torch; for mmpretrain's tests it need not (pretrain.py).
TORCHVISION ?= torchvision==0.28.0
VENV := .venv
BIN := $(VENV)/bin

DEMO_CONFIG := configs/deeplabv3/deeplabv3_knr18-d8_1xb4-600_toy-cityscapes-128x256.py
DEMO_DATA := data/toy_cityscapes
DEMO_WORK := work_dirs/demo

.PHONY: demo test test-onedl test-pretrain lint check gpu clean

demo: $(VENV)/.installed
	$(BIN)/python tools/toy_cityscapes $(DEMO_DATA) --workers 2 --force
	$(BIN)/python tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO_WORK)
	$(BIN)/python tools/test.py $(DEMO_CONFIG) $(DEMO_WORK)/iter_600.pth --work-dir $(DEMO_WORK)
	$(BIN)/python tools/analysis_tools/compare_predictions.py $(DEMO_CONFIG) \
	    $(DEMO_WORK)/iter_600.pth --out $(DEMO_WORK)/scenes.png

# Two processes of one thread; a file's tests stay together, as they share trainings.
PYTEST := python -m pytest -n 2 --dist loadfile
test test-onedl test-pretrain: export OMP_NUM_THREADS := 1

test: $(VENV)/.installed
	$(BIN)/$(PYTEST)

# The same plugin on the maintained fork, which owns the same import names.
test-onedl: $(VENV)-onedl/.installed
	$(VENV)-onedl/bin/$(PYTEST) tests/test_stack.py tests/checkpoints tests/tools/test_tools.py \
	    tests/tools/test_analysis_tools.py tests/engine/test_safe_checkpoint_hook.py \
	    tests/engine/test_binary_tta.py tests/tools/test_any_segmentor.py \
	    tests/privacy/test_private_training.py

# Classifiers in mmpretrain's hands. In an environment of its own: a torchvision that does not fit
# stops every training of mmengine, unless tests have declared its operators.
test-pretrain: export MMPRETRAIN_REQUIRED := 1
test-pretrain: $(VENV)-pretrain/.installed
	$(VENV)-pretrain/bin/python -m pip install --no-deps '$(TORCHVISION)'
	$(VENV)-pretrain/bin/$(PYTEST) tests/configs/test_classification_configs.py \
	    tests/configs/test_classification_training.py tests/checkpoints/test_convnext.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .

check: $(VENV)/.installed
	$(BIN)/python tools/dev/check_house.py

# GPU_PYTHON: a Python that has torch and the rest already, on a machine without a network.
gpu: $(if $(GPU_PYTHON),,$(VENV)/.installed)
	$(or $(GPU_PYTHON),$(BIN)/python) tools/benchmarks/check_gpu.py $(PART)

clean:
	rm -rf $(VENV) $(VENV)-onedl $(VENV)-pretrain $(DEMO_DATA) $(DEMO_WORK)

$(VENV)/.installed: EXTRAS := lite,test,kernels,lint
$(VENV)-onedl/.installed: EXTRAS := onedl,test
$(VENV)-pretrain/.installed: EXTRAS := lite,mmpretrain,test
# KN models need no compiled op of the fork's mmcv.
$(VENV)-onedl/.installed: export MMCV_WITH_OPS := 0

%/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $*
	$*/bin/python -m pip install --upgrade pip
	$*/bin/python -m pip install '$(TORCH)'
	$*/bin/python -m pip install -e '.[$(EXTRAS)]'
	touch $@
