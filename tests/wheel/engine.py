"""Check an installed hf_skiprnn: the native engine comes from the installation and is used; on Windows there is none.

    python tests/wheel/engine.py        # with the Python of the environment to check

It needs nothing but the package, so that cibuildwheel runs it for each wheel.
"""

import sys
from pathlib import Path

import torch

import hf_skiprnn
from hf_skiprnn import SkipRNNConfig, SkipRNNForSequenceClassification
from hf_skiprnn.kernels import choose_engine
from hf_skiprnn.kernels.cpu import library

assert Path(hf_skiprnn.__file__).is_relative_to(sys.prefix), f"not the installed package: {hf_skiprnn.__file__}"
x = torch.randn(3, 50, 2)
model = SkipRNNForSequenceClassification(SkipRNNConfig(input_size=2, hidden_size=20, update_bias=-2.0)).eval()
model.set_scan_backend("dense")
definition = model(x).logits
model.set_scan_backend("auto")
torch.testing.assert_close(model(x).logits, definition)
taken = choose_engine("auto", x, 100).name
if sys.platform == "win32":
    assert taken == "events", taken
    assert library.unavailable_reason() == library.NOT_FOR_WINDOWS
else:
    assert taken == "cpu", library.unavailable_reason()
    model.set_scan_backend("cpu")
    torch.testing.assert_close(model(x).logits, definition)
    assert Path(library.engine()._name).is_relative_to(sys.prefix), library.engine()._name
print(f"hf_skiprnn {hf_skiprnn.__version__}: scans run in {taken!r}.")
