"""Runs a training step in prefold and in PyTorch, alternately, each time in a new process, and prints the ratios.

    python benches/peers/compare.py --prefold target/release/prefold --model benches/shapes/llama-15m --rounds 3

Needs the packages of requirements.txt in the Python that runs it; prefold needs none of them.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))


def run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefold", required=True, help="the prefold binary, built with --release")
    parser.add_argument("--model", required=True, help="folder with config.json")
    parser.add_argument("--method", default="prefix_plus", choices=["prefix_plus", "lora", "prefix", "full"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, nargs="+", default=[128])
    parser.add_argument("--labelled", type=float, nargs="+", default=[1.0, 0.25])
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--offload-optimizer", action="store_true", help="prefold keeps the optimizer's moments in a file")
    parser.add_argument("--json", metavar="FILE", help="write all measurements there")
    arguments = parser.parse_args()
    results = []
    print(f"{'batch x seq':>12} {'labelled':>9} {'prefold':>12} {'PyTorch':>12} {'time':>7} {'memory':>7}")
    for seq in arguments.seq:
        for labelled in arguments.labelled:
            shape = ["--model", arguments.model, "--method", arguments.method, "--batch", str(arguments.batch)]
            shape += ["--seq", str(seq)]
            shape += ["--labelled", str(labelled), "--steps", str(arguments.steps), "--json"]
            saving = ["--checkpoint-activations"] if arguments.checkpoint_activations else []
            saving += ["--offload-optimizer"] if arguments.offload_optimizer else []
            ours, theirs = [], []
            for _ in range(arguments.rounds):
                ours.append(run([arguments.prefold, "bench", "train", *shape, *saving]))
                theirs.append(run([sys.executable, os.path.join(HERE, "torch_step.py"), *shape]))
            results.append({"seq": seq, "labelled": labelled, "prefold": ours, "pytorch": theirs})
            seconds = [statistics.median(r["median_seconds"] for r in runs) for runs in (ours, theirs)]
            ratios = [a["median_seconds"] / b["median_seconds"] for a, b in zip(ours, theirs)]
            memory = [max(r["peak_memory"] or 0 for r in runs) for runs in (ours, theirs)]
            print(
                f"{arguments.batch:>6} x {seq:<4} {labelled:>8.0%} {seconds[0] * 1e3:>9.0f} ms {seconds[1] * 1e3:>9.0f} ms"
                f" {statistics.median(ratios):>7.2f} {memory[0] / memory[1]:>7.2f}",
                flush=True,
            )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
