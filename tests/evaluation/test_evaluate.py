"""`amid-trl evaluate` on tiny models: the figures are computed again from the text."""

import json
import math
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from evaluating import ROWS, SHORT, jsonl, logits_behind, references_of, tokens_of
from peft import LoraConfig, get_peft_model
from rouge_score.rouge_scorer import RougeScorer
from tiny import tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM

from amid_trl import cli
from amid_trl.evaluation.evaluate import evaluate
from amid_trl.evaluation.models import EvaluationModels
from amid_trl.evaluation.settings import EvaluationSettings


# ---- The figures ----


def test_rouge_l_is_that_of_the_stored_completions(evaluated):
    results, _ = evaluated
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    of_seeds = []
    for seed in (10, 20):
        texts = [each["text"] for each in results["completions"] if each["seed"] == seed]
        best = [
            max(scorer.score(reference, text)["rougeL"].fmeasure for reference in references_of(row))
            for text, row in zip(texts, ROWS, strict=True)
        ]
        of_seeds.append(100 * sum(best) / len(best))
        assert results["per_seed"][str(seed)]["rougeL"] == pytest.approx(of_seeds[-1])
    assert of_seeds[0] != of_seeds[1]
    assert results["metrics"]["rougeL"] == pytest.approx(sum(of_seeds) / 2)
    assert results["metrics"]["rougeL_std"] == pytest.approx(abs(of_seeds[0] - of_seeds[1]) / 2)


def test_lengths_are_means_over_the_completions_of_a_seed(evaluated):
    results, folder = evaluated
    kept = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for seed, figures in results["per_seed"].items():
        ids = [each["ids"] for line in kept if line["seed"] == int(seed) for each in line["completions"]]
        assert figures["mean_length"] == pytest.approx(sum(map(len, ids)) / len(ROWS))
        clipped = [row[-1] != tiny_tokenizer().eos_token_id for row in ids]
        assert figures["clipped_ratio"] == pytest.approx(sum(clipped) / len(ROWS)) and 0 < sum(clipped) < len(ROWS)
    assert results["metrics"]["mean_length"] == pytest.approx(
        statistics.fmean(figures["mean_length"] for figures in results["per_seed"].values())
    )


def test_distinct_n_counts_over_all_completions_of_a_seed(tmp_path, models, rows_file):
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,), temperature=0.5)
    results = evaluate(models["teacher"], tmp_path / "out", settings)
    words = [each["text"].split() for each in results["completions"]]
    pairs = [pair for text in words for pair in pairwise(text)]
    first = len({word for text in words for word in text}) / sum(map(len, words))
    second = len(set(pairs)) / len(pairs)
    assert results["metrics"]["distinct_1"] == pytest.approx(first) and first < 0.95
    assert results["metrics"]["distinct_2"] == pytest.approx(second) and second != first


def test_the_teachers_perplexity_is_that_of_the_students_tokens(evaluated, models):
    results, folder = evaluated
    perplexities = []
    for seed in (10, 20):
        nats = tokens = 0
        for line in map(json.loads, (folder / "completions.jsonl").read_text().splitlines()):
            for each in line["completions"] if line["seed"] == seed else []:
                prompt, _ = tokens_of(ROWS[each["row"]], "")
                logits = logits_behind(models["teacher"], prompt, each["ids"])
                nats += float(F.cross_entropy(logits, torch.tensor(each["ids"]), reduction="sum"))
                tokens += len(each["ids"])
        perplexities.append(math.exp(nats / tokens))
        assert results["per_seed"][str(seed)]["teacher_perplexity"] == pytest.approx(perplexities[-1], rel=1e-5)
    assert results["metrics"]["teacher_perplexity"] == pytest.approx(sum(perplexities) / 2, rel=1e-5)


def test_the_first_reference_is_scored_behind_its_prompt_to_its_eos(evaluated, models):
    results, _ = evaluated
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    for row, kept in zip(ROWS, results["rows"], strict=True):
        prompt, answer = tokens_of(row, references_of(row)[0])
        log_q, log_p = (logits_behind(models[name], prompt, answer).log_softmax(-1) for name in ("student", "teacher"))
        figures = [
            F.nll_loss(log_q, torch.tensor(answer), reduction="sum"),
            F.kl_div(log_q, log_p, log_target=True, reduction="sum"),
            (log_q.argmax(-1) == log_p.argmax(-1)).sum(),
        ]
        assert kept["tokens"] == len(answer) and kept["nll"] == pytest.approx(
            float(figures[0]) / len(answer), rel=1e-5
        )
        sums += torch.stack([figure.double() for figure in figures])
        tokens += len(answer)
    want = dict(zip(("nll", "kl_pq", "top1_agreement"), (sums / tokens).tolist(), strict=True))
    assert 0 < want["top1_agreement"] < 1
    assert {name: results["metrics"][name] for name in want} == pytest.approx(want, rel=1e-5)
    assert results["metrics"]["reference_tokens"] == tokens
    text = "".join(references_of(row)[0] for row in ROWS)
    bits = float(sums[0]) / math.log(2)
    assert results["metrics"]["bits_per_byte"] == pytest.approx(bits / len(text.encode()), rel=1e-5)


def test_without_a_teacher_there_is_the_nll_alone(tmp_path, models, rows_file, evaluated):
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,))
    metrics = evaluate(models["student"], tmp_path / "out", settings)["metrics"]
    assert metrics["nll"] == pytest.approx(evaluated[0]["metrics"]["nll"])
    assert metrics["rougeL_std"] == 0
    assert not {"kl_pq", "top1_agreement", "teacher_perplexity"} & set(metrics)


def test_a_reference_is_scored_up_to_max_new_tokens(tmp_path, models, rows_file):
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,), max_new_tokens=3)
    results = evaluate(models["student"], tmp_path / "out", settings)
    assert [row["tokens"] for row in results["rows"]] == [3] * len(ROWS)
    # Of a byte-level token every letter is a byte.
    tokens = [tiny_tokenizer().convert_ids_to_tokens(tokens_of(row, references_of(row)[0])[1][:3]) for row in ROWS]
    assert [row["bytes"] for row in results["rows"]] == [sum(map(len, of_row)) for of_row in tokens]


def test_an_adapter_is_evaluated_with_its_base(tmp_path, models, rows_file):
    base = AutoModelForCausalLM.from_pretrained(models["student"])
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.full_like(parameter, 0.3)
    model.save_pretrained(tmp_path / "adapter")
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,))
    adapted = evaluate(str(tmp_path / "adapter"), tmp_path / "adapted", settings)
    in_memory = evaluate(model, tmp_path / "memory", settings, tokenizer=tiny_tokenizer())
    plain = evaluate(models["student"], tmp_path / "plain", settings)
    assert adapted["metrics"] == pytest.approx(in_memory["metrics"], rel=1e-5)
    assert adapted["metrics"]["nll"] != pytest.approx(plain["metrics"]["nll"], rel=1e-3)


def test_a_model_with_offloaded_weights_has_the_same_figures(tmp_path, models, rows_file):
    student = AutoModelForCausalLM.from_pretrained(models["student"])
    cpu_offload(student.model.layers[1], torch.device("cpu"))
    assert all(parameter.is_meta for parameter in student.model.layers[1].parameters())
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,), limit=2)
    offloaded = evaluate(student, tmp_path / "offloaded", settings, tokenizer=tiny_tokenizer())
    plain = evaluate(models["student"], tmp_path / "plain", settings)
    assert offloaded["settings"]["weights"] == plain["settings"]["weights"]
    assert offloaded["metrics"] == pytest.approx(plain["metrics"])


def test_a_padded_vocabulary_is_neither_scored_nor_written(tmp_path, models, rows_file):
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer, seed=0, vocab_size=len(tokenizer) + 300)
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,))
    results = evaluate(model, tmp_path / "out", settings, tokenizer=tokenizer)
    kept = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    assert max(token for line in kept for each in line["completions"] for token in each["ids"]) < len(tokenizer)
    prompt, answer = tokens_of(ROWS[0], references_of(ROWS[0])[0])
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1, : len(tokenizer)].double()
    assert results["rows"][0]["nll"] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(answer))), rel=1e-5)


# ---- Sampling ----


def test_a_seeds_completions_depend_on_no_other_seed_and_on_no_random_state(tmp_path, models, rows_file, evaluated):
    torch.manual_seed(99)
    state = torch.get_rng_state()
    alone = evaluate(models["student"], tmp_path / "out", replace(SHORT, evaluation_set=rows_file, seeds=(20,)))
    assert torch.equal(torch.get_rng_state(), state)
    texts = {seed: [each["text"] for each in evaluated[0]["completions"] if each["seed"] == seed] for seed in (10, 20)}
    assert [each["text"] for each in alone["completions"]] == texts[20] != texts[10]


def test_the_whole_distribution_is_sampled_from(models):
    tokenizer = tiny_tokenizer()
    student = AutoModelForCausalLM.from_pretrained(models["student"])
    student.generation_config.top_k = 1  # ships with the model, and is greedy
    config = EvaluationModels(student, None, tokenizer).sampling(EvaluationSettings("dolly"))
    assert (config.temperature, config.top_p, config.top_k, config.no_repeat_ngram_size) == (1.0, 1.0, 0, 6)
    assert (config.do_sample, config.max_new_tokens) == (True, 256)


@pytest.mark.parametrize(("top_p", "draws"), [(1.0, True), (1e-6, False)])
def test_a_small_top_p_leaves_nothing_to_draw(tmp_path, models, rows_file, top_p, draws):
    settings = replace(SHORT, evaluation_set=rows_file, temperature=2.0, top_p=top_p)
    completions = evaluate(models["student"], tmp_path / "out", settings)["completions"]
    first, second = ([each["text"] for each in completions if each["seed"] == seed] for seed in (10, 20))
    assert (first != second) == draws


def test_batches_of_the_same_prompts_draw_other_answers(tmp_path, models):
    data = jsonl(tmp_path / "rows.jsonl", [ROWS[0]] * 4)
    settings = replace(SHORT, evaluation_set=data, seeds=(10,), batch_size=2)
    first, second, third, fourth = evaluate(models["student"], tmp_path / "out", settings)["completions"]
    assert [first["text"], second["text"]] != [third["text"], fourth["text"]]


def test_the_dtype_is_that_of_the_flag(tmp_path, models, rows_file):
    flags = ("--limit", "1", "--seeds", "1", "--max-new-tokens", "2", "--dtype", "bfloat16")
    where = ("--evaluation-set", rows_file, "--output-dir", str(tmp_path / "out"))
    assert cli.main(["evaluate", models["student"], *where, *flags]) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("size", "repeats"), [(0, True), (1, False)])
def test_no_ngram_is_written_twice_unless_that_rule_is_off(tmp_path, models, rows_file, size, repeats):
    settings = replace(SHORT, evaluation_set=rows_file, seeds=(10,), temperature=2.0, no_repeat_ngram_size=size)
    evaluate(models["student"], tmp_path / "out", settings)
    kept = [json.loads(line) for line in (tmp_path / "out" / "completions.jsonl").read_text().splitlines()]
    written = [each["ids"] for line in kept for each in line["completions"]]
    assert any(len(set(ids)) < len(ids) for ids in written) == repeats
