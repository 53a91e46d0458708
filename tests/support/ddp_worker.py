"""One process of a data-parallel run (see test_distributed.py); rank 0 writes what it saw."""

import json
import os
import sys

import torch
from tiny import messages_dataset, multi_turn_dataset, tiny_llama, tiny_tokenizer

from amid_trl import AMiDConfig, AMiDTrainer


def main(output_dir: str, settings: dict) -> None:
    tokenizer = tiny_tokenizer()
    rows, one_prompt, resumed_from = (settings.pop(name, None) for name in ("rows", "one_prompt", "resumed_from"))
    dataset = multi_turn_dataset(rows) if settings.get("lmbda") == 0 else messages_dataset(rows)
    if one_prompt:
        dataset = dataset.select([0] * rows)
    trainer = AMiDTrainer(
        tiny_llama(tokenizer),
        tiny_llama(tokenizer, seed=1, hidden_size=48),
        AMiDConfig(
            output_dir=output_dir,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            max_new_tokens=6,
            **{"save_strategy": "no", **settings},
        ),
        train_dataset=dataset,
        eval_dataset=multi_turn_dataset(5),
        processing_class=tokenizer,
    )
    windows, fetch = [], trainer.get_batch_samples

    def fetch_and_remember(*args):
        batches, count = fetch(*args)
        texts = [row[row != -100].tolist() for batch in batches for row in batch["labels"]]
        windows.append({"source": trainer._parts.window.source, "completions": texts, "count": int(count)})
        return batches, count

    trainer.get_batch_samples = fetch_and_remember
    trainer.train(resume_from_checkpoint=resumed_from)
    evaluation = trainer.evaluate()
    rank = int(os.environ.get("RANK", 0))
    state = {name: part.tolist() for name, part in trainer._parts.sources.state_dict().get("replay", {}).items()}
    result = {"log": trainer.state.log_history, "evaluation": evaluation, "windows": windows, "replay": state}
    with open(os.path.join(output_dir, f"rank{rank}.json"), "w") as file:
        json.dump(result, file)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    os.makedirs(sys.argv[1], exist_ok=True)
    main(sys.argv[1], json.loads(sys.argv[2]))
