"""Checks graphs with the official checker, shape inference included: `check-onnx.py FOLDER [FOLDER …]`."""

import sys
from pathlib import Path

import onnx

for folder in sys.argv[1:]:
    path = Path(folder) / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    print(f"{path.parent.name}: the onnx {onnx.__version__} checker accepts it")
