"""Uses a hosted model as a layer of your own network. There are no labels to hide, so gradients are sent in the clear.

blindtune serve --model minilm --port 8001 --no-auth &
python examples/backbone_only.py
"""

from pathlib import Path

import torch
from peft import LoraConfig

import blindtune as bt

adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"])
backbone = bt.Backbone(["http://127.0.0.1:8001"], adapter=adapter)
scorer = torch.nn.Sequential(torch.nn.Linear(backbone.hidden_size, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam([*backbone.parameters(), *scorer.parameters()], lr=1e-3)

texts = ["short", "a somewhat longer text", "a text that goes on for quite a while, as texts sometimes do"]
lengths = torch.tensor([[len(text) / 50.0] for text in texts])

for step in range(5):
    loss = torch.nn.functional.mse_loss(scorer(backbone(texts)), lengths)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(step, float(loss.detach()))

backbone.lora_adapters()[0].save_pretrained(Path("out/backbone-only"))  # PeftModel.from_pretrained reads it
