"""lm-eval gives a decoder without quantization the scores of the model itself; `make lm-eval` installs lm-eval.

The scores of a quantized decoder differ by what its logits do.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from decoding_models import byte_tokenizer, llama

import qcompiler
from benchmarks.local_tasks import local_task

WHY = "lm-eval is not installed: run `make lm-eval`"
harnesses: Any = pytest.importorskip("lm_eval.models.huggingface", reason=WHY)
api: Any = pytest.importorskip("lm_eval.api.instance", reason=WHY)

PAIRS = (("The sky is", " blue"), ("A", " b c"), ("One two three", " four"), ("x", "yz"))
TEXTS = ("The sky is blue over the sea.", "A b c is what follows, and then d.", "One two three four five six.")
LONG = "A text that is longer than the window of the model, which has sixty positions only."


def scores(model: Any, tokenizer: Any) -> tuple[Any, ...]:
    """Log-likelihoods of continuations and of a long text, and a generated text, with padded batches."""

    def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
        return [api.Instance(kind, {}, each, index) for index, each in enumerate(arguments)]

    harness = harnesses.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=60)
    options = {"until": ["q"], "max_gen_toks": 8, "do_sample": False}
    return (
        harness.loglikelihood(asked("loglikelihood", *PAIRS), disable_tqdm=True),
        harness.loglikelihood_rolling(asked("loglikelihood_rolling", (LONG,)), disable_tqdm=True),
        harness.generate_until(asked("generate_until", ("The sky", options)), disable_tqdm=True),
    )


@pytest.mark.filterwarnings("default")  # of lm-eval and the packages that it loads
def test_scores_are_those_of_the_model() -> None:
    model, tokenizer = llama(vocab_size=300), byte_tokenizer()
    llm = qcompiler.decoder(model, scheme=None, max_batch=3, max_length=64, tokenizer=tokenizer, progress=False)
    want, got = scores(model, tokenizer), scores(llm.for_transformers(), tokenizer)
    assert got[2] == want[2]
    assert [greedy for _, greedy in got[0]] == [greedy for _, greedy in want[0]]
    numbers = [[each for each, _ in found[0]] + found[1] for found in (got, want)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-5)


def results(model: Any, tokenizer: Any, folder: Path) -> tuple[float, float]:
    """Accuracy of a multiple choice, and the perplexity of a byte, over local files."""
    evaluator = pytest.importorskip("lm_eval")
    questions = [
        {"question": f"{number} comes before", "choices": [" 1", " 22", " abc", " z"], "answer": number % 4}
        for number in range(12)
    ]
    choice = local_task(
        folder, "local_choice", questions, output_type="multiple_choice", doc_to_text="{{question}}",
        doc_to_choice="choices", doc_to_target="answer", metric_list=[{"metric": "acc"}],
    )  # fmt: skip
    reading = local_task(
        folder, "local_text", [{"text": text} for text in TEXTS], output_type="loglikelihood_rolling",
        doc_to_text="", doc_to_target="{{text}}", metric_list=[{"metric": "byte_perplexity"}],
    )  # fmt: skip
    harness = harnesses.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, max_length=60)
    found = evaluator.simple_evaluate(model=harness, tasks=[choice, reading], bootstrap_iters=0)["results"]
    return found["local_choice"]["acc,none"], found["local_text"]["byte_perplexity,none"]


def log_likelihood(model: Any, tokenizer: Any) -> float:
    """Of all texts, each after the end token, as lm-eval computes it."""
    total = 0.0
    for text in TEXTS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].float().log_softmax(-1)
        total += float(logits.gather(1, ids[0, 1:, None]).sum())
    return total


@pytest.mark.filterwarnings("default")
def test_tasks_over_local_files(tmp_path: Path) -> None:
    model, tokenizer = llama(vocab_size=300), byte_tokenizer()
    options: dict[str, Any] = {"max_batch": 3, "max_length": 64, "tokenizer": tokenizer, "progress": False}
    plain, quantized = (
        qcompiler.decoder(model, scheme=scheme, kv_cache=cache, **options).for_transformers()
        for scheme, cache in ((None, None), ("fp8_tile", "fp8"))
    )
    want = results(model, tokenizer, tmp_path)
    assert results(plain, tokenizer, tmp_path) == pytest.approx(want, rel=1e-5)
    accuracy, perplexity = results(quantized, tokenizer, tmp_path)
    assert 0 <= accuracy <= 1 and perplexity != pytest.approx(want[1], rel=1e-5)
    bytes_ = sum(len(text.encode()) for text in TEXTS)
    changed = (log_likelihood(quantized, tokenizer) - log_likelihood(model, tokenizer)) / bytes_
    assert perplexity / want[1] == pytest.approx(float(torch.tensor(-changed).exp()), rel=1e-4)
