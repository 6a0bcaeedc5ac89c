"""The tuner without a GPU: what it would measure, how it uses times, and which files it accepts."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hopper_kernels import all_configs, choose, estimated_time, refusal

from codegen.gemm import tuned, tuner
from codegen.gemm.tuner import Measured, Tuning
from codegen.targets.hopper import HOPPER
from codegen.templates.gemm import GEMM, GemmConfig, GemmFamily, GemmProblem
from qcompiler import CodegenError, knobs

PROBLEMS = [
    GemmProblem(16, 4096, 7168), GemmProblem(64, 4096, 4096), GemmProblem(4096, 4096, 4096),
    GemmProblem(16, 1024, 1024, scale_columns=False), GemmProblem(128, 512, 1000, x_block=-1),
    GemmProblem(256, 4096, 4096, x_block=64), GemmProblem(256, 2048, 2048, kind="rows_f8"),
    GemmProblem(2048, 2048, 2048, kind="rows_i8", out_bytes=4),
]  # fmt: skip
PROBLEM = PROBLEMS[0]
FAMILY = GEMM.family(HOPPER)
HEADER = {"format": 1, "device": "NVIDIA H200", "triton": "3.6.0", "kernels": "0123"}


def candidates(problem: GemmProblem) -> list[GemmConfig]:
    return tuner.candidates(problem, FAMILY)


def another(problem: GemmProblem) -> GemmConfig:
    """A configuration that can run it and that the estimate does not choose."""
    return next(config for config in candidates(problem) if config != choose(problem))


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuned, "use_cache_folder", lambda: str(tmp_path / "folder"))
    monkeypatch.setattr(tuned, "header_of", lambda device: HEADER | {"device": f"device {device}"})
    monkeypatch.setattr(tuned, "_learned", {})
    monkeypatch.setattr(tuned, "gpu_at", lambda device: HOPPER)
    monkeypatch.setattr(tuner, "gpu_at", lambda device: HOPPER)
    tuned.forget()
    yield
    tuned.forget()


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_candidates_can_run_and_are_near_the_best_estimate(problem: GemmProblem) -> None:
    found = candidates(problem)
    assert found[0] == choose(problem) and len(set(found)) == len(found)
    times = [estimated_time(config, problem) for config in found]
    assert times == sorted(times) and times[-1] <= 2 * times[0]
    assert all(refusal(config, problem) is None for config in found)
    left_out = set(all_configs(problem.kind, problem.x_block)) - set(found)
    for config in left_out:
        assert refusal(config, problem) is not None or estimated_time(config, problem) > 2 * times[0]


def test_the_estimate_is_kept_unless_it_is_clearly_beaten() -> None:
    estimated, other = choose(PROBLEM), another(PROBLEM)
    close = Measured(PROBLEM, {other: 9.9, estimated: 10.0}, estimated)
    assert close.best == estimated and close.ratio == 1.0 and "as estimated" in str(close)
    beaten = Measured(PROBLEM, {other: 8.0, estimated: 10.0}, estimated)
    assert beaten.best == other and beaten.ratio == 0.8 and "0.80 of the estimated choice, 10.0 us" in str(beaten)
    text = str(Tuning((close, beaten), "the file"))
    assert text.startswith("2 GEMMs measured, 1 with a better") and text.endswith("stored in the file")


def test_ranks_choose_by_the_slowest_rank() -> None:
    """Each would choose another configuration alone; a rank with other GEMMs is an error."""
    estimated, other = choose(PROBLEM), another(PROBLEM)
    own = [Measured(PROBLEM, {other: 8.0, estimated: 10.0}, estimated)]
    theirs = [Measured(PROBLEM, {estimated: 10.5, other: 12.0}, estimated)]
    texts = [tuner.times_of(own), tuner.times_of(theirs)]
    one, two = tuner.slowest(own, texts), tuner.slowest(theirs, texts)
    assert one == two == [Measured(PROBLEM, {estimated: 10.5, other: 12.0}, estimated)]
    assert list(one[0].times) == [estimated, other] and one[0].best == estimated
    assert tuner.slowest(own, texts[:1]) == own
    with pytest.raises(CodegenError, match="the ranks have measured different GEMMs: got 2 ranks"):
        tuner.slowest(own, [texts[0], tuner.times_of([])])


def test_a_full_disk_keeps_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tuned.learn(0, {PROBLEM: another(PROBLEM)})
    before = path.read_bytes()

    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuned, "replacing_file", full)
    with pytest.raises(CodegenError, match=r"the tuned configurations cannot be saved: got .*No space.*need room for"):
        tuned.learn(0, {PROBLEMS[2]: another(PROBLEMS[2])})
    assert path.read_bytes() == before


def test_results_are_used_by_this_process_and_by_others_on_request() -> None:
    other, second = another(PROBLEM), PROBLEMS[2]
    assert tuned.config_for(0, PROBLEM) == choose(PROBLEM)
    path = tuned.learn(0, {PROBLEM: other})
    assert tuned.config_for(0, PROBLEM) == other and tuned.config_for(1, PROBLEM) == choose(PROBLEM)
    assert tuned.learn(0, {second: another(second)}) == path
    assert tuned.config_for(0, PROBLEM) == other, "earlier results are kept"
    tuned._learned.clear()  # as in a new process
    tuned.forget()
    assert tuned.config_for(0, PROBLEM) == choose(PROBLEM)
    tuned._learned.clear()
    with knobs.scope(tuned=True):
        tuned.forget()
        assert tuned.config_for(0, PROBLEM) == other and tuned.config_for(0, second) == another(second)
        assert tuned.config_for(1, PROBLEM) == choose(PROBLEM)
        assert tuned.config_for(0, PROBLEMS[1]) == choose(PROBLEMS[1])
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_configuration_that_cannot_run_is_not_used() -> None:
    wide = GemmProblem(4096, 4096, 4096)
    wanted = next(config for config in candidates(wide) if config.variant == "warp")
    odd = dataclasses.replace(wide, scale_columns=False)
    tuned.learn(0, {odd: wanted})
    assert tuned.config_for(0, odd) == choose(odd)


def changed(**changes: Any) -> str:
    """A file whose only GEMM has this change."""
    product: dict[str, dict[str, Any]] = {
        "problem": dataclasses.asdict(PROBLEM),
        "config": dataclasses.asdict(choose(PROBLEM)),
    }
    for name, value in changes.items():
        product["config" if name in product["config"] else "problem"][name] = value
    return json.dumps({"header": HEADER, "gemms": [product]})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "JSONDecodeError"),
        (changed()[:-20], "JSONDecodeError"),
        ("[]", "TypeError"),
        ("{}", "KeyError: 'header'"),
        (json.dumps({"header": HEADER | {"triton": "3.7.0"}, "gemms": []}), "ValueError: it was made for"),
        (json.dumps({"header": HEADER, "gemms": [1]}), "TypeError"),
        (changed(block_m=48), "ValueError: there is no configuration"),
        (changed(colour=1), "TypeError"),
        (changed(kind="rows"), "ValueError: there is no configuration"),
    ],
)
def test_damaged_and_foreign_files_are_ignored_with_a_warning(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.warns(UserWarning, match=f"file.json is not used: {says}"):
        assert tuned.read(path, HEADER, FAMILY) == {}
    assert path.read_text() == text


def test_an_intact_file_is_read_and_a_missing_one_gives_none(tmp_path: Path) -> None:
    assert tuned.read(tmp_path / "none.json", HEADER, FAMILY) == {}
    path = tmp_path / "file.json"
    path.write_text(changed())
    assert tuned.read(path, HEADER, FAMILY) == {PROBLEM: choose(PROBLEM)}


def test_another_device_or_kernel_is_another_file(tmp_path: Path) -> None:
    assert tuned.file_of(0) != tuned.file_of(1) and tuned.file_of(0) == tuned.file_of(0)
    (tmp_path / "a.py").write_text("1")
    first = tuned.hash_of(tmp_path.glob("*.py"))
    (tmp_path / "a.py").write_text("2")
    assert first != tuned.hash_of(tmp_path.glob("*.py"))


def test_tuning_measures_each_gemm_once(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    def measure(problem: GemmProblem, family: GemmFamily) -> Measured:
        return Measured(problem, {another(problem): 1.0, choose(problem): 2.0}, choose(problem))

    monkeypatch.setattr(tuner, "measure", measure)
    monkeypatch.setattr(torch.cuda, "device", lambda _: torch.no_grad())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    crooked = dataclasses.replace(PROBLEM, aligned=False)
    result = tuner.tune(
        [PROBLEM, PROBLEMS[1], PROBLEM, crooked], torch.device("cpu"), lambda done, of, _: told.append((done, of))
    )
    assert [each.problem for each in result.gemms] == [PROBLEM, PROBLEMS[1]] and told == [(1, 2), (2, 2)]
    assert result.file == str(tuned.file_of(0)) and tuned.config_for(0, PROBLEM) == another(PROBLEM)
    assert tuner.tune([crooked], torch.device("cpu")).note == "there is no GEMM to measure"
