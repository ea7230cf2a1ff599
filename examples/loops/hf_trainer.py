"""Distillation in Hugging Face's Trainer: a subclass whose compute_loss asks Distiller.

Texts of 16 words are about one of 6 topics, and half of their words about nothing. A BERT of 2 layers has learned 4000
labelled ones. A BERT of 1 layer learns from 200 labels alone, and again, for as many steps, what the teacher says about
the 4000, without a label. The data set is a list of dictionaries, which are torch tensors with "labels" among them.

    pip install potstill transformers accelerate
    python examples/loops/hf_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from potstill.distill import Distiller, HardLabels, SoftTargets
from potstill.distill.metrics import accuracy

TOPICS, WORDS, LENGTH, TEXTS, LABELLED, STEPS = 6, 300, 16, 4000, 200, 300
QUIET = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "dataloader_pin_memory": False}


class DistillingTrainer(Trainer):
    loss_is_scaled_for_ga = True  # compute_loss divides by the rows of all accumulated batches itself

    def __init__(self, distiller: Distiller, args: TrainingArguments, **options: Any) -> None:
        optimizer = torch.optim.AdamW(distiller.parameters(), lr=args.learning_rate)  # also of the strategies
        super().__init__(distiller.student, args, optimizers=(optimizer, None), **options)
        self.distiller = distiller
        for module in (distiller.teacher, distiller.strategies):  # Trainer moves the student
            if module is not None:
                module.to(args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:  # evaluation: the model's own loss
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        item = {k: v for k, v in inputs.items() if k != "labels"}, inputs["labels"]
        loss = self.distiller.loss(item, step=self.state.global_step + 1, student=model)  # model: maybe wrapped
        share = (inputs["labels"] != -100).sum() / num_items_in_batch  # of the rows of the accumulated batches
        return loss * share * self.accelerator.num_processes  # which average their gradients


def texts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    frequencies = torch.distributions.Dirichlet(torch.full((TOPICS, WORDS), 0.1)).sample()
    topics = torch.randint(TOPICS, (TEXTS + 1000,))
    return torch.multinomial(frequencies[topics] + frequencies.mean(0), LENGTH, replacement=True), topics


def bert(layers: int, width: int) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 2 * width, "vocab_size": WORDS}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=4, num_labels=TOPICS))


def main() -> None:
    torch.set_num_threads(1)  # models as small as these do not gain from a second
    words, topics = texts()
    data = [{"input_ids": w, "labels": y} for w, y in zip(words[:TEXTS], topics[:TEXTS], strict=True)]
    validate = accuracy([({"input_ids": words[TEXTS:]}, topics[TEXTS:])])

    def learn(name: str, student: nn.Module, rows: list[dict[str, Tensor]], teacher: nn.Module | None = None) -> None:
        strategy = HardLabels() if teacher is None else SoftTargets(temperature=2.0, alpha=1.0)
        before = validate(student)
        args = TrainingArguments(max_steps=STEPS, per_device_train_batch_size=32, learning_rate=2e-3, **QUIET)
        DistillingTrainer(Distiller(teacher, student, strategy), args, train_dataset=rows).train()
        print(f"{name}: {before} untrained, {validate(student)} trained")

    teacher = bert(2, 64)
    learn("teacher", teacher, data)
    learn("student alone", bert(1, 32), data[:LABELLED])
    learn("student distilled", bert(1, 32), data, teacher)


if __name__ == "__main__":
    main()
