"""The step of `prefold bench train` in PyTorch: transformers + peft, and Prefix-Tuning+ as an attention function.

    python benches/peers/torch_step.py --model benches/shapes/llama-15m --batch 8 --seq 128 --labelled 1.0 --steps 5 --json
"""

import argparse
import json
import resource
import statistics
import time

import torch
import transformers
from torch import nn


def prefix_plus(model):
    """Adds elu(q) @ M to the attention output before o_proj (arXiv 2506.13674, Eq. 7); returns what is trained."""
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    base = transformers.AttentionInterface()["sdpa"]
    memories = nn.ParameterList(nn.Parameter(torch.zeros(heads, width, width)) for _ in range(config.num_hidden_layers))

    def attention(module, query, key, value, attention_mask, **options):
        mixed, weights = base(module, query, key, value, attention_mask, **options)
        term = nn.functional.elu(query) @ memories[module.layer_idx].to(query.dtype)
        return mixed + term.transpose(1, 2), weights

    transformers.AttentionInterface.register("prefix_plus", attention)
    config._attn_implementation = "prefix_plus"
    return list(memories)


def trained(model, method):
    """The model to run and its trainable parameters."""
    if method == "full":
        return model, list(model.parameters())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if method == "prefix_plus":
        return model, prefix_plus(model)
    import peft

    if method == "lora":
        options = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    else:
        options = peft.PrefixTuningConfig(num_virtual_tokens=32, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, options)
    return model, [p for p in model.parameters() if p.requires_grad]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--method", default="prefix_plus", choices=["prefix_plus", "lora", "prefix", "full"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--labelled", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="f32", choices=["f32", "bf16", "f16"])
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    config = transformers.AutoConfig.from_pretrained(arguments.model)
    device = torch.device(arguments.device)
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[arguments.dtype]
    with device:
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        model, parameters = trained(model, arguments.method)
    model.config.use_cache = arguments.method == "prefix"
    if arguments.checkpoint_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    ids = torch.randint(0, config.vocab_size, (arguments.batch, arguments.seq), device=device)
    first = arguments.seq - min(max(round(arguments.labelled * arguments.seq), 1), arguments.seq - 1)
    labels = ids.clone()
    labels[:, :first] = -100
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for step in range(arguments.warmup + arguments.steps):
        started = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if step >= arguments.warmup:
            seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    median = statistics.median(seconds)
    report = {
        "seconds": seconds,
        "median_seconds": median,
        "tokens_per_second": arguments.batch * arguments.seq / median,
        "peak_memory": peak,
        "loss": float(loss.detach()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report, indent=2) if arguments.json else f"{median * 1e3:.1f} ms, {peak >> 20} MiB")


if __name__ == "__main__":
    main()
