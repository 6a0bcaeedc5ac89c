"""Calls equivalent to the captured one are accepted; others get an error that names the difference."""

from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcompiler
from qcompiler.artefact.leeway_text import leeway_from_json, leeway_to_json
from qcompiler.artefact.strict_json import Node
from qcompiler.capture import Captured, capture
from qcompiler.capture.leeway import Leeway, OptionalTensor
from qcompiler.errors import ArtefactError, CaptureError, InputError
from qcompiler.ir.sizes import parse_size
from qcompiler.program.batches import Batches


class Scorer(nn.Module):
    """Called like models of transformers: an optional mask, labels that add a loss, a switch, a hidden default."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(32, 64), nn.Linear(64, 32)

    def forward(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        scale: float = 1.5,
        extra: Tensor | None = None,
    ) -> dict[str, Tensor]:
        places = torch.arange(ids.shape[1], device=ids.device) if position_ids is None else position_ids
        x = self.embed(ids) * scale + places[..., None]
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        found = {"logits": self.head(x)}
        if labels is not None:
            found = {"loss": nn.functional.cross_entropy(found["logits"].flatten(0, 1), labels.flatten()), **found}
        return found


@pytest.fixture(scope="module")
def model() -> Scorer:
    torch.manual_seed(0)
    return Scorer().eval()


@pytest.fixture(scope="module")
def plain(model: Scorer) -> Captured:
    """Captured with token ids only."""
    return capture(model, (tokens(2, 7),))


@pytest.fixture(scope="module")
def full(model: Scorer) -> Captured:
    """Captured with all columns of a data set; the ids are the labels, one tensor for both."""
    ids = tokens(2, 7)
    return capture(
        model, kwargs={"ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "extra": torch.ones(3)}
    )


def tokens(rows: int, columns: int) -> Tensor:
    return torch.randint(0, 32, (rows, columns))


def test_arguments_without_effect_may_be_added(model: Scorer, plain: Captured) -> None:
    ids = tokens(3, 5)
    want = model(ids)["logits"]
    ones, places = torch.ones_like(ids), torch.arange(5).expand(3, 5)
    calls: list[dict[str, Any]] = [
        {}, {"attention_mask": ones}, {"attention_mask": ones.bool()}, {"attention_mask": ones.float()},
        {"position_ids": places}, {"attention_mask": ones, "position_ids": places.int(), "scale": 1.5, "labels": None},
        {"attention_mask": None, "extra": None},
    ]  # fmt: skip
    for call in calls:
        assert torch.equal(plain.run(ids, **call)["logits"], want), call
    assert torch.equal(plain.run(ids, ones, places)["logits"], want)  # by position, too


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"attention_mask": torch.tensor([[1, 1, 0]])}, "'attention_mask' was not given at capture, where omitting it "
     "means ones: got other entries. Omit it here, or compile with it among the example inputs."),
    ({"attention_mask": torch.ones(1, 4)}, r"means ones: got shape \(1, 4\); need shape \(1, 3\)"),
    ({"attention_mask": [[1, 1, 1]]}, "means ones: got list; need a tensor"),
    ({"position_ids": torch.tensor([[1, 2, 3]])}, "'position_ids' was not given at capture, where omitting it means"),
    ({"labels": torch.ones(1, 3)}, r"'labels' was not given at capture: got a tensor of shape \(1, 3\); need ids"),
    ({"scale": 2.0}, "'scale' was not given at capture: got 2.0; need ids"),
    ({"atention_mask": None}, "'atention_mask' was not given at capture. Known: ids"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), WRONG)
def test_arguments_with_an_effect_are_named(plain: Captured, call: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        plain.run(tokens(1, 3), **call)


def test_arguments_without_effect_may_be_omitted(model: Scorer, full: Captured) -> None:
    ids = tokens(3, 5)
    labels, mask = tokens(3, 5), torch.ones_like(ids)
    mask[0, 0] = 0
    torch.testing.assert_close(full.run(ids=ids, labels=labels), model(ids, labels=labels), rtol=0, atol=0)
    torch.testing.assert_close(full.run(ids=ids, attention_mask=mask), model(ids, mask), rtol=0, atol=0)
    for other in (None, torch.ones(8, 2, 2), torch.ones((), dtype=torch.int64)):  # unused
        got = full.run(ids, mask, labels=labels, extra=other)
        assert list(got) == ["loss", "logits"] and torch.equal(got["loss"], model(ids, mask, labels=labels)["loss"])
    assert list(full.run(ids)) == ["logits"] == list(full.run(ids, labels=None))


class Both(nn.Module):
    """Labels change all outputs, and a mask of ones is not equivalent to None."""

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        x = x.float() * 2 if attention_mask is None else x * attention_mask.float()
        return {"y": x, "z": x} if labels is None else {"y": x + labels, "z": x - labels}


def test_equivalence_is_not_assumed_without_evidence() -> None:
    x = tokens(2, 3)
    with_labels = capture(Both().eval(), (x, None, torch.ones(2, 3)))
    with pytest.raises(InputError, match="'labels' was given at capture, and the graph requires it"):
        with_labels.run(x)
    with pytest.raises(InputError, match=r"'attention_mask' is part|attention_mask is part of the captured graph"):
        with_labels.run(x, torch.ones(2, 3), torch.ones(2, 3))
    with_mask = capture(Both().eval(), (x, torch.ones(2, 3)))
    with pytest.raises(InputError, match="'attention_mask' was given at capture, and the graph requires it"):
        with_mask.run(x)


class Padded(nn.Module):
    """Derives a mask from padding: None differs from ones, but only if there is padding."""

    config = SimpleNamespace(pad_token_id=0)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return (ids + 1) * ((ids != 0) + 1 if attention_mask is None else attention_mask + 1)


def test_padding_is_tried(plain: Captured) -> None:
    captured = capture(Padded().eval(), (torch.ones(2, 3, dtype=torch.int64),))
    assert captured.signature.leeway.optional == ()
    assert [optional.name for optional in plain.signature.leeway.optional] == ["attention_mask", "position_ids"]


def test_integers_are_widened_and_other_dtypes_are_named(model: Scorer, plain: Captured) -> None:
    ids = tokens(2, 3)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(plain.run(ids.to(dtype))["logits"], model(ids)["logits"])
    narrow = capture(Written().eval(), (torch.zeros(3, dtype=torch.int32), torch.ones(3, dtype=torch.int32)))
    with pytest.raises(
        InputError, match=r"y has a different dtype .* got torch.int64; need torch.int32. Convert it with .to"
    ):
        narrow.run(torch.zeros(3, dtype=torch.int32), torch.ones(3, dtype=torch.int64))
    with pytest.raises(InputError, match="x has a different dtype"):  # the model writes into it
        narrow.run(torch.zeros(3, dtype=torch.int16), torch.ones(3, dtype=torch.int16))
    narrow.run(torch.zeros(3, dtype=torch.int32), torch.ones(3, dtype=torch.int16))
    for wrong in (ids.float(), ids > 3):
        with pytest.raises(InputError, match="ids has a different dtype than at capture"):
            plain.run(wrong)


class Written(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x += y
        return x * 2


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (
            np.ones((2, 3)),
            "ids must be a tensor: got ndarray; need torch.int64 of rank 2. Convert it with torch.as_tensor",
        ),
        (
            [[1, 2], [3, 4]],
            "'ids' has a different structure .* got list of 2; need one value. Convert it with torch.as_t",
        ),
        (UserDict(ids=1), r"ids must be a tensor: got UserDict; .* Pass its entries by name: model\(\*\*batch\)"),
        ({"ids": 1}, r"got dict with ids; need one value. Pass its entries by name: model\(\*\*batch\)"),
        ("text", "ids must be a tensor: got 'text'"),
        (None, "'ids' was given at capture, and the graph requires it"),
    ],
)
def test_a_value_that_is_not_a_tensor_gets_a_conversion_hint(plain: Captured, wrong: Any, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        plain.run(wrong)


def test_one_tensor_for_two_arguments_stays_two_inputs() -> None:
    x = torch.randn(3, 4)
    model = Both().eval()
    captured = capture(model, (x, None, x))
    other = torch.randn(3, 4)
    assert torch.equal(captured.run(x, None, other)["y"], model(x, None, other)["y"])
    layer = nn.Linear(4, 4).eval()  # a weight as an input
    weighted = capture(layer, (layer.weight.detach(),))
    assert torch.equal(weighted.run(x), layer(x)) and capture(layer, (layer.weight,)).graph.inputs[0].type == (
        weighted.graph.inputs[0].type
    )
    assert torch.equal(capture(layer, (layer.weight,)).run(x), layer(x))


def test_calibration_accepts_what_the_signature_accepts(plain: Captured) -> None:
    ids = tokens(2, 3)
    batch: dict[str, Any] = {"ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    for source in (batch, UserDict(batch)):
        assert [inputs[0] is ids for inputs in Batches([source]).flattened(plain.signature)] == [True]
    with pytest.raises(InputError, match=r"means ones: got other entries \(in batches\[1\] of the calibration\)"):
        list(Batches([batch, {**batch, "attention_mask": torch.zeros(2, 3)}]).flattened(plain.signature))
    with pytest.raises(
        CaptureError, match=r"example_inputs is of a wrong type: got UserDict.* Write example_kwargs=batch"
    ):
        qcompiler.compile(Scorer().eval(), example_inputs=UserDict(batch))  # type: ignore[arg-type]


def test_a_loaded_model_is_called_like_the_saved_one(model: Scorer, tmp_path: Path) -> None:
    ids = tokens(2, 3)
    fast = qcompiler.compile(
        model, example_kwargs={"ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, strict=False
    )
    fast.save(tmp_path / "model")
    loaded = qcompiler.load(tmp_path / "model")
    assert loaded.signature.leeway == fast.signature.leeway != Leeway()
    for call in (
        {"ids": ids},
        {"ids": ids.int(), "labels": ids},
        {"ids": ids, "position_ids": torch.arange(3).expand(2, 3)},
    ):
        torch.testing.assert_close(loaded(**call), fast(**call), rtol=0, atol=0)


def test_leeway_as_json() -> None:
    shape = (parse_size("s0"), parse_size("2*s1"), 3)
    leeway = Leeway({"use_cache": False}, (OptionalTensor("labels", "anything", shape, ("['loss']",)),), ("x",), ("y",))
    text = leeway_to_json(leeway)
    assert leeway_from_json(Node(text, "", Path("f")), {"s0", "s1"}) == leeway
    with pytest.raises(ArtefactError, match="sizes that the inputs decide, not s1"):
        leeway_from_json(Node(text, "", Path("f")), {"s0"})
    text["optional"][0]["value"] = "twos"
    with pytest.raises(ArtefactError, match="got 'twos'; need one of ones, zeros, positions, anything"):
        leeway_from_json(Node(text, "", Path("f")), {"s0", "s1"})


# Models of transformers


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_arguments_of_transformers(llama: Any) -> None:
    captured = capture(llama, (tokens(2, 7),))
    ids = tokens(3, 5)
    with torch.no_grad():
        want = llama(ids, use_cache=False)
    calls: list[dict[str, Any]] = [
        {"use_cache": False}, {"return_dict": True}, {"output_attentions": False, "output_hidden_states": None},
        {"attention_mask": torch.ones_like(ids)}, {"past_key_values": None, "use_cache": None}, {"logits_to_keep": 0},
    ]  # fmt: skip
    for call in calls:
        got = captured.run(ids, **call)
        assert type(got) is type(want) and torch.equal(got.logits, want.logits), call
    for call in ({"use_cache": True}, {"return_dict": False}, {"output_hidden_states": True}):
        with pytest.raises(InputError, match=f"{next(iter(call))!r} was not given at capture: got (True|False)"):
            captured.run(ids, **call)
    explicit = capture(llama, (tokens(2, 7),), {"use_cache": False, "return_dict": True})
    assert torch.equal(explicit.run(ids).logits, want.logits)
    with pytest.raises(
        InputError, match="use_cache is part of the captured graph and cannot change: got True; need Fa"
    ):
        explicit.run(ids, use_cache=True)
