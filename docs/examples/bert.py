"""Fine-tune a small BERT on labelled sentences. Its layers learn from synthetic gradients; padding does not count."""

from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import dnifx

torch.manual_seed(0)
lines = [line.split("\t") for line in Path(__file__).with_name("tiny.txt").read_text().splitlines()]
words = {word: number for number, word in enumerate(sorted({w for text, _ in lines for w in text.split()}), start=1)}
coded = [torch.tensor([words[word] for word in text.split()]) for text, _ in lines]
ids = torch.nn.utils.rnn.pad_sequence(coded, batch_first=True)
mask, labels = (ids > 0).long(), torch.tensor([int(label) for _, label in lines])

size = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
model = BertForSequenceClassification(BertConfig(vocab_size=len(words) + 1, num_labels=2, **size))
inputs = {"input_ids": ids, "attention_mask": mask}
loss = lambda output, target: torch.nn.functional.cross_entropy(output.logits, target)  # noqa: E731
net = dnifx.decouple(model, ["bert.encoder.layer.1"], kwargs=inputs, loss=loss, mask="attention_mask")
trainer = net.trainer(lambda parameters: torch.optim.Adam(parameters, lr=5e-4))
losses = [trainer.step(**inputs, target=labels).loss.item() for _ in range(120)]
with torch.no_grad():
    right = (net.eval()(**inputs).logits.argmax(-1) == labels).float().mean().item()
print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}, {right:.0%} right")
