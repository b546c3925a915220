"""Exports a checkpoint with prefold and with optimum's exporter, alternately, each time in a new process.

    python benches/peers/export.py --prefold target/release/prefold --model smollm2-hf --rounds 3

Needs the packages of requirements-optimum.txt in the Python that runs it, and Linux for the memory. `hf_folder.py` writes
SmolLM2 as a folder that both read. Both sides write a decoder with a cache in float32; the page cache is warm for both.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile

from measure import measure

OPTIMUM = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", dtype="fp32", device="cpu",
            do_validation=False)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefold", required=True, help="the prefold binary, built with --release")
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--dialect", default="portable", choices=["portable", "ort"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write all measurements there")
    arguments = parser.parse_args()
    results = {"prefold": [], "optimum": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            ours, theirs = os.path.join(scratch, "prefold"), os.path.join(scratch, "optimum")
            options = ["--model", arguments.model, "--dialect", arguments.dialect, "--out", ours]
            results["prefold"].append(measure([arguments.prefold, "export", *options]))
            results["optimum"].append(measure([sys.executable, "-c", OPTIMUM, arguments.model, theirs]))
    print(f"{'':>8} {'time':>10} {'resident':>13} {'allocated':>13}")
    medians = {}
    for name, runs in results.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        resident, allocated = (max(run[key] for run in runs) for key in ("resident", "allocated"))
        medians[name] = (seconds, resident, allocated)
        print(f"{name:>8} {seconds:>8.2f} s {resident >> 20:>9} MiB {allocated >> 20:>9} MiB")
    ratios = [a / b for a, b in zip(medians["optimum"], medians["prefold"])]
    print(f"{'ratio':>8} {ratios[0]:>10.1f} {ratios[1]:>13.1f} {ratios[2]:>13.1f}")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
