"""Decodes with prefold's `ort` dialect and with the onnxruntime-genai builder's graph of the same model, in float32.

    python benches/peers/decode.py --prefold target/release/prefold --model smollm2-hf

Needs the packages of requirements-genai.txt in the Python that runs it. The graphs are written anew, prefold's as it is by default, exact
for padding on either side, and for padding on the right alone, as the builder's is. `prefold bench graph` loads them many times,
and they take turns in ONNX Runtime on the CPU. The builder's graph comes first, so that a time ratio below 1 says that
prefold's is faster.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile

from measure import measure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefold", required=True, help="the prefold binary, built with --release")
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--loads", type=int, default=8, help="how often all are loaded")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds after a loading")
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--decode-steps", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", metavar="FILE", help="write all measurements there")
    arguments = parser.parse_args()
    with open(os.path.join(arguments.model, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    with tempfile.TemporaryDirectory() as scratch:
        theirs, either, right = (os.path.join(scratch, name) for name in ("genai", "either", "right"))
        builder = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        measure([*builder, "-i", arguments.model, "-o", theirs, "-p", "fp32", "-e", "cpu", "-c", scratch])
        export = [arguments.prefold, "export", "--model", arguments.model, "--dialect", "ort", "--out"]
        measure([*export, either])
        measure([*export, right, "--right-padding-only"])
        command = [arguments.prefold, "bench", "graph", theirs, either, right, "--json", "--head-dim", str(head_dim)]
        command += ["--prompt-length", str(arguments.prompt_length), "--decode-steps", str(arguments.decode_steps)]
        command += ["--batch", str(arguments.batch), "--rounds", str(arguments.rounds)]
        command += ["--loads", str(arguments.loads)]
        command += ["--threads", str(arguments.threads)] if arguments.threads else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        report = json.loads(done.stdout)
    print(f"{'':>29} {'prefill':>11} {'ratio':>7} {'decode':>18} {'time ratio':>11}")
    for name, graph in zip(["genai", "prefold", "prefold, right padding only"], report["graphs"]):
        print(
            f"{name:>29} {graph['median_prefill_ms']:>8.1f} ms {graph['prefill_ratio']:>7.3f}"
            f" {graph['decode_tokens_per_second']:>9.1f} tokens/s {graph['decode_ratio']:>11.3f}"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
