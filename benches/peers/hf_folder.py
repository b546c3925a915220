"""Writes a GGUF checkpoint as a Hugging Face folder in float32, for exporters that read nothing else.

    python benches/peers/hf_folder.py ~/.cache/prefold/models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf smollm2-hf

Needs the packages of requirements-optimum.txt. The GGUF file is the one that `prefold fetch smollm2` brings.
"""

import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

source, target = sys.argv[1:]
folder, name = os.path.split(os.path.abspath(source))
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
config = model.config
# what was read is plain float32 by now, but the model says that it is quantised and would not be saved
if hasattr(config, "quantization_config"):
    del config.quantization_config
plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
plain.load_state_dict(model.state_dict())
plain.save_pretrained(target)
AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(target)
