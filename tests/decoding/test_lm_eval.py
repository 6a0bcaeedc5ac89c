"""lm-eval gives a decoder without quantization the scores of the model itself; `make lm-eval` installs lm-eval."""

from typing import Any

import pytest
from decoding_models import byte_tokenizer, llama

import qcompiler

WHY = "lm-eval is not installed: run `make lm-eval`"
harnesses: Any = pytest.importorskip("lm_eval.models.huggingface", reason=WHY)
api: Any = pytest.importorskip("lm_eval.api.instance", reason=WHY)

PAIRS = (("The sky is", " blue"), ("A", " b c"), ("One two three", " four"), ("x", "yz"))
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
