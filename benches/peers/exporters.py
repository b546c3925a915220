"""Folds Prefix-Tuning+ into graphs of other exporters, for tiny models of many families, and judges what was folded.

    python benches/peers/exporters.py --prefold target/release/prefold --exporter dynamo18 --then int4 int8 qdq ort

Needs the packages of requirements.txt, and onnx, onnxscript and onnxruntime; for `optimum` those of requirements-optimum.txt;
for `slim` onnxslim. Everything is made anew from random weights, in a folder that goes away.

A graph in float32 is right where its adapted logits are within 1e-4 of PyTorch's, whose attention has the term added; where its own
logits are not so without an adapter, and whatever another tool made of it (a quantised graph is another model), the sites alone
tell: each site's output grows by elu(q) M (computed here in float64, to 1e-5), and its q is that of the float32 graph, up to what
quantising did (slope within 0.1 of 1, cosine above 0.93). Folding has to run, and unfolding gives the file back byte for byte.
"""

import argparse
import collections
import logging
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
import transformers
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

warnings.filterwarnings("ignore")
logging.disable(logging.WARNING)
transformers.logging.set_verbosity_error()

TOKENS, LENGTH, WINDOW = 512, 24, 8
PLAIN = dict(
    vocab_size=TOKENS,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
GROUPED = dict(PLAIN, num_key_value_heads=2)
DECLARED = dict(GROUPED, head_dim=16)
GPT = dict(vocab_size=TOKENS, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
# by family: the name that transformers' classes begin with, and a configuration
FAMILIES = {
    "apertus": ("Apertus", GROUPED),
    "arcee": ("Arcee", GROUPED),
    "biogpt": ("BioGpt", PLAIN),
    "bloom": ("Bloom", PLAIN),
    "codegen": ("CodeGen", dict(GPT, n_head=8, rotary_dim=4)),
    "cohere": ("Cohere", GROUPED),
    "ernie4_5": ("Ernie4_5", DECLARED),
    "exaone4": ("Exaone4", dict(DECLARED, sliding_window=WINDOW, sliding_window_pattern=2)),
    "falcon": ("Falcon", PLAIN),
    "falcon_alibi": ("Falcon", dict(PLAIN, alibi=True, multi_query=False, parallel_attn=False, bias=True)),
    "falcon_grouped": ("Falcon", dict(PLAIN, new_decoder_architecture=True, num_kv_heads=2)),
    "gemma": ("Gemma", DECLARED),
    "gemma2": ("Gemma2", dict(DECLARED, sliding_window=WINDOW, query_pre_attn_scalar=32)),
    "glm": ("Glm", DECLARED),
    "glm4": ("Glm4", DECLARED),
    "gpt2": ("GPT2", GPT),
    "gpt_bigcode": ("GPTBigCode", GPT),
    "gpt_neo": ("GPTNeo", dict(PLAIN, num_layers=2, attention_types=[[["global", "local"], 1]], window_size=WINDOW)),
    "gpt_neox": ("GPTNeoX", PLAIN),
    "gptj": ("GPTJ", dict(GPT, rotary_dim=8)),
    "granite": ("Granite", dict(GROUPED, attention_multiplier=0.1)),
    "helium": ("Helium", DECLARED),
    "hunyuan": ("HunYuanDenseV1", DECLARED),
    "llama": ("Llama", GROUPED),
    "mistral": ("Mistral", dict(GROUPED, sliding_window=WINDOW)),
    "mpt": ("Mpt", dict(PLAIN, max_seq_len=256)),
    "mpt_clipped": ("Mpt", dict(PLAIN, max_seq_len=256, attn_config=dict(clip_qkv=1.5, softmax_scale=0.1))),
    "nemotron": ("Nemotron", GROUPED),
    "olmo": ("Olmo", GROUPED),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", GROUPED),
    "opt": ("OPT", dict(PLAIN, ffn_dim=128, word_embed_proj_dim=64)),
    "persimmon": ("Persimmon", PLAIN),
    "phi": ("Phi", GROUPED),
    "phi3": ("Phi3", GROUPED),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", DECLARED),
    "seed_oss": ("SeedOss", DECLARED),
    "smollm3": ("SmolLM3", GROUPED),
    "stablelm": ("StableLm", GROUPED),
    "stablelm_normed": ("StableLm", dict(GROUPED, qk_layernorm=True, use_parallel_residual=True)),
    "starcoder2": ("Starcoder2", GROUPED),
    "xglm": ("XGLM", dict(PLAIN, ffn_dim=128)),
}
# those that are not told positions, and those whose attention is given a query that is scaled already
COUNTS_POSITIONS, SCALES_QUERY = ("biogpt", "bloom", "falcon_alibi", "mpt", "mpt_clipped", "opt"), ("opt", "xglm")
TOOLS = ("int4", "int8", "qdq", "slim", "ort")


class Adapted(TorchFunctionMode):
    """While it is entered, each layer's attention has the term of Prefix-Tuning+, with an M that is made for it.

    Attention is known, in whatever module, by a softmax between two products: the query is what the first multiplies.
    """

    def __init__(self, scales_query):
        super().__init__()
        self.matrices, self.scales_query, self.query, self.weighs = [], scales_query, None, False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output, name = function(*args, **kwargs), function.__name__.strip("_")
        if name == "softmax":
            self.weighs = True
        elif name in ("matmul", "bmm", "baddbmm") and not self.weighs:
            self.query = kwargs.get("batch1", args[0])
        elif name in ("matmul", "bmm"):
            self.weighs = False
            heads, _, head_dim = self.query.shape[-3:]
            self.matrices.append(0.05 * torch.randn(heads, head_dim, head_dim))
            query = self.query * head_dim**0.5 if self.scales_query else self.query
            return output + torch.nn.functional.elu(query) @ self.matrices[-1]
        return output


def make_model(family, folder):
    """A model whose random weights are large enough that attention is far from uniform."""
    name, options = FAMILIES[family]
    torch.manual_seed(sum(map(ord, family)))
    model = getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))(
        getattr(transformers, name + "Config")(**options)
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            elif any(part in parameter_name for part in ("embed", "wte", "wpe")):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.6 / parameter.shape[-1] ** 0.5)
    model.float().save_pretrained(folder)


def reference(family, folder, adapter, feeds):
    """PyTorch's logits without and with an adapter, which is written, and its matrices."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    inputs = {name: torch.tensor(feeds[name]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        base = model(**inputs, use_cache=False).logits.numpy()
        with Adapted(family in SCALES_QUERY) as made:
            adapted = model(**inputs, use_cache=False).logits.numpy()
    save_file({f"layers.{layer}.M": matrix for layer, matrix in enumerate(made.matrices)}, adapter)
    return base, adapted, [matrix.double().numpy() for matrix in made.matrices]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, position_ids=None):
        positions = {} if position_ids is None else {"position_ids": position_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions).logits


def export(family, exporter, folder, target):
    raw = exporter.endswith("raw")
    implementation = "sdpa" if raw else "eager"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation).eval()
    target.parent.mkdir(parents=True)
    if exporter == "optimum":
        from optimum.exporters.onnx import onnx_export_from_model

        onnx_export_from_model(
            model, target.parent, task="text-generation-with-past", do_validation=False, preprocessors=None
        )
        return
    ids = torch.randint(4, TOKENS, (2, 10))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family not in COUNTS_POSITIONS:
        inputs["position_ids"] = torch.arange(10).repeat(2, 1)
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=256)}
    torch.onnx.export(
        Logits(model),
        tuple(inputs.values()),
        target,
        dynamo=True,
        optimize=not raw,
        opset_version=int(exporter.removeprefix("dynamo").removesuffix("raw")),
        input_names=list(inputs),
        output_names=["logits"],
        dynamic_shapes=tuple(axes for _ in inputs),
        external_data=False,
        verbose=False,
    )


def session(model, optimised=True):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def all_inputs(runner, feeds):
    """What a graph is fed for these tokens: all at once, after an empty past."""
    given = {}
    for port in runner.get_inputs():
        empty = [1 if at == 0 else size if isinstance(size, int) else 0 for at, size in enumerate(port.shape)]
        given[port.name] = feeds[port.name] if port.name in feeds else np.zeros(empty, np.float32)
    return given


def run(model, feeds, outputs=("logits",), optimised=True):
    runner = session(model, optimised)
    return runner.run(list(outputs), all_inputs(runner, feeds))


class Calibration:
    def __init__(self, source):
        runner = session(str(source))
        self.rows = iter([all_inputs(runner, tokens(seed)) for seed in range(1, 5)])

    def get_next(self):
        return next(self.rows, None)


def apply(tool, source, target):
    target.parent.mkdir(parents=True)
    if tool == "int4":
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(onnx.load(source), block_size=32, is_symmetric=True)
        quantizer.process()
        quantizer.model.save_model_to_file(str(target))
    elif tool == "int8":
        from onnxruntime.quantization import quantize_dynamic

        quantize_dynamic(source, target)
    elif tool == "qdq":
        from onnxruntime.quantization import QuantFormat, quantize_static

        products, rows = ["MatMul", "Gemm"], Calibration(source)
        quantize_static(source, target, rows, quant_format=QuantFormat.QDQ, op_types_to_quantize=products)
    elif tool == "slim":
        import onnxslim

        onnx.save(onnxslim.slim(str(source)), target)
    else:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(target)
        onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def tokens(seed):
    ids = np.random.default_rng(seed).integers(4, TOKENS, size=(1, LENGTH))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(LENGTH)[None]}


def heads_first(value, shape):
    """`[1, heads, seq, head_dim]` of a tensor in whatever layout a graph has it."""
    heads, head_dim = shape
    value = np.asarray(value, np.float64)
    if value.shape[-2:] == (LENGTH, head_dim):
        return value.reshape(1, heads, LENGTH, head_dim)
    return value.reshape(1, LENGTH, heads, head_dim).transpose(0, 2, 1, 3)


def sites(folder, feeds, matrices):
    """By layer, a folded graph's query, and by how much its output grows otherwise than by the term."""
    model = onnx.load(folder / "model.onnx")
    nodes = {node.name.split("prefold.1/layers.")[-1]: node for node in model.graph.node if "prefold.1/" in node.name}
    names = []
    for layer in range(len(matrices)):
        names.append((nodes[f"{layer}/Elu"].input[0], nodes[f"{layer}/Add"].input[0], nodes[f"{layer}/Add"].output[0]))
    given = {output.name for output in model.graph.output}
    for name in dict.fromkeys(name for layer in names for name in layer):
        if name not in given:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    found = []
    for names_of_layer, matrix in zip(names, matrices):
        values = run(model.SerializeToString(), feeds, names_of_layer, optimised=False)
        query, output, total = (heads_first(value, matrix.shape[:2]) for value in values)
        term = np.where(query > 0, query, np.expm1(np.minimum(query, 0))) @ matrix
        found.append((query, np.abs(total - output - term).max() / np.abs(term).max()))
    return found


def same_query(one, two):
    one, two = one.ravel(), two.ravel()
    slope, cosine = one @ two / (two @ two), one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    return abs(slope - 1) < 0.1 and cosine > 0.93


def fold(prefold, graph, adapter, target):
    """What prefold says against it, or nothing."""
    command = [prefold, "--quiet", "fold", "--graph", graph, "--adapter", adapter, "--out", target]
    folded = subprocess.run(command, capture_output=True, text=True, check=False)
    if folded.returncode != 0:
        return " ".join((folded.stderr + folded.stdout).split())
    back = target.with_name("back")
    subprocess.run([prefold, "--quiet", "unfold", target, "--out", back], check=True, capture_output=True)
    return None if (back / "model.onnx").read_bytes() == graph.read_bytes() else "unfolded to another file"


def judge(prefold, family, exporter, tools, scratch):
    """Pairs of a form of the family's graph and what was found."""
    feeds, checkpoint, adapter = tokens(0), scratch / "hf", scratch / "adapter.safetensors"
    plain = scratch / "float" / "model.onnx"
    try:
        make_model(family, checkpoint)
        export(family, exporter, checkpoint, plain)
        logits = run(str(plain), feeds)[0]
    except Exception as error:  # what models, exporters and runtimes raise is theirs
        yield "float", "not made", str(error)
        return
    base, adapted, matrices = reference(family, checkpoint, adapter, feeds)
    own, queries = np.abs(logits - base).max(), None
    for form in ["float", *tools]:
        graph, target = scratch / form / "model.onnx", scratch / form / "folded"
        try:
            if form != "float":
                apply(form, plain, graph)
            run(str(graph), feeds)
        except Exception as error:  # as above
            yield form, "not made", str(error)
            continue
        against = fold(prefold, graph, adapter, target)
        if against is not None:
            yield form, "refused", against
            continue
        found = sites(target, feeds, matrices)
        term = max(off for _, off in found)
        queries = queries or [query for query, _ in found]
        right = term < 1e-5 and all(same_query(query, plain) for (query, _), plain in zip(found, queries))
        told = f"term {term:.0e}"
        if form == "float":
            distance = np.abs(run(str(target / "model.onnx"), feeds)[0] - adapted).max()
            right = right and (distance < 1e-4 or own > 1e-4)
            told += f", logits {distance:.0e} (base {own:.0e}, moved {np.abs(adapted - base).max():.0e})"
        yield form, "right" if right else "WRONG", told


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefold", required=True, type=os.path.abspath, help="the prefold binary")
    told = "optimum, or dynamo and an opset; `raw` behind it: not optimised, and with torch's own attention operator"
    parser.add_argument("--exporter", default="dynamo18", help=told)
    parser.add_argument("--then", nargs="*", default=[], choices=TOOLS, help="what is made of each graph")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES), choices=list(FAMILIES))
    arguments = parser.parse_args()
    counts = collections.Counter()
    for family in arguments.families:
        with tempfile.TemporaryDirectory() as scratch:
            judged = judge(arguments.prefold, family, arguments.exporter, arguments.then, pathlib.Path(scratch))
            for form, verdict, told in judged:
                counts[verdict] += 1
                print(f"{family:15} {form:6} {verdict:9} {told[:200]}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    sys.exit(1 if counts["WRONG"] or counts["refused"] else 0)


if __name__ == "__main__":
    main()
