"""Trains padded LoRA in a torch loop of your own, over two operators that you start on this machine.

blindtune serve --model minilm --port 8001 --no-auth &
blindtune serve --model minilm --port 8002 --no-auth &
python examples/own_loop.py
"""

import torch

import blindtune as bt

texts = [
    "the rash came back after two days",
    "no complaints since the last visit",
    "a dull ache in the lower back, worse at night",
    "sleeping well and walking every day",
] * 16
labels = [1, 0, 1, 0] * 16  # never leave this process

backbone = bt.Backbone(["http://127.0.0.1:8001", "http://127.0.0.1:8002"])
method = bt.PaddedLoRA(steps=10, batch_size=16, predictions=5)  # all that one operator sees: μ = 0.25, ε < 1
model = bt.PrivateModel(backbone, head=bt.LinearHead(backbone.hidden_size, 2), method=method, ledger="out/own-loop")
model.prepare(texts, labels)  # frozen features of the texts; starts the head
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

for step in range(10):
    if step % 4 == 0:  # a new epoch: the order must not depend on labels
        order = torch.randperm(len(texts)).split(16)
    chosen = order[step % 4].tolist()
    output = model([texts[i] for i in chosen], [labels[i] for i in chosen])
    optimizer.zero_grad()
    output.loss.backward()  # shares of the gradient go to the two operators
    optimizer.step()
    print(step, {name: round(value, 3) for name, value in output.parts.items()}, model.method.report())

model.save_pretrained("out/own-loop", classes=["well", "ill"])
