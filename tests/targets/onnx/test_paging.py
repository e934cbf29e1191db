"""Experts that are left on the disk: the same bits, and only what tokens use is read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.compiler.common.errors import ArtifactError, UsageError
from moec.compiler.common.mapped_files import MappedFile
from moec.compiler.common.recency import RecentExperts
from moec.compiler.families.tiny_models import tiny_model
from moec.compiler.run import packing
from moec.targets.onnx.paging import PagedRunner, Step
from moec.targets.onnx.places import places_of
from moec.targets.onnx.runner import OnnxRunner
from moec.targets.onnx.target import OnnxTarget
from moec.targets.paging import PagingRunner
from moec.targets.runners import Row

IDS = np.random.default_rng(0).integers(3, 128, (2, 40))
Packed = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """Packed weights by format and flavor; the artifact lies beside them."""
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    tiny_model("qwen2_moe", hidden_size=64, moe_intermediate_size=64).save_pretrained(checkpoint)
    made: dict[tuple[str, ...], Path] = {}

    def pack(form: str = "int4", flavor: str = "default", dtype: str = "fp32") -> Path:
        key = (form, flavor, dtype)
        if key not in made:
            directory = tmp_path_factory.mktemp("made")
            quantize = {"format": form, "rounding": "rtn"}
            options = {"flavor": flavor, "routing_outputs": True, "experts": "kernel"}
            moec.export(
                checkpoint,
                target="onnx",
                output=directory / "out",
                gates=False,
                quantize=quantize,
                dtype=dtype,
                options=options,
            )
            packing.pack_into(directory / "out", directory / "packed", lambda *_: None)
            made[key] = directory / "packed"
        return made[key]

    return pack


def steps(runner: OnnxRunner) -> list[np.ndarray]:
    padded = np.ones(IDS.shape, np.int64)
    padded[0, :7] = 0
    found = [runner.prefill(IDS[:, :-2]), runner.decode(IDS[:, -2:-1]), runner.decode(IDS[:, -1:])]
    return [*found, runner.prefill(IDS, padded), runner.prefill(IDS[:1, :1])]


@pytest.mark.parametrize(
    ("form", "flavor", "dtype"),
    [
        ("int4", "default", "fp32"),
        ("int8", "default", "fp32"),
        ("int4", "genai", "fp32"),
        ("int4", "default", "fp16"),
        ("none", "default", "fp32"),
    ],
)
@pytest.mark.parametrize(("experts", "drop"), [(0, True), (3, False), (1000, True)])
def test_the_bits_are_those_without_a_limit(
    form: str, flavor: str, dtype: str, experts: int, drop: bool, packed: Packed
) -> None:
    directory = packed(form, flavor, dtype)
    size = places_of(directory).layers[0].size
    plain = OnnxRunner(directory, threads=1)
    paged = PagedRunner(directory, lambda: experts * size, threads=1, drop_cache=drop)
    assert isinstance(paged, PagingRunner)
    for want, found in zip(steps(plain), steps(paged), strict=True):
        np.testing.assert_array_equal(found, want)
    assert {key: counts.tolist() for key, counts in paged.expert_tokens.items()} == {
        key: counts.tolist() for key, counts in plain.expert_tokens.items()
    }


@pytest.mark.parametrize("experts", [0, 5, 9, 1000])
def test_the_counts_are_those_of_a_memory_that_is_simulated(experts: int, packed: Packed) -> None:
    """What tokens use is known from the outputs that the artifact has for it."""
    directory = packed()
    sizes = OnnxTarget().weight_sizes(directory)
    memory = experts * sizes.experts[0]
    runner, plain = PagedRunner(directory, lambda: memory, threads=1), OnnxRunner(directory, threads=1)
    simulated = RecentExperts(sizes.experts, memory)
    uses, hits = np.zeros(len(sizes.counts), np.int64), np.zeros(len(sizes.counts), np.int64)
    for position in range(30):
        before = {layer: counts.copy() for layer, counts in plain.expert_tokens.items()}
        for one in (plain, runner):
            one.decode(IDS[:1, position : position + 1])
        for layer, counts in plain.expert_tokens.items():
            used = np.flatnonzero(counts - before[layer]).tolist()
            missing, _ = simulated.use(layer, used)
            uses[layer] += len(used)
            hits[layer] += len(used) - len(missing)
    assert runner.paging.uses.tolist() == uses.tolist()
    assert runner.paging.hits.tolist() == hits.tolist()
    assert uses.sum() > 60
    assert (hits.sum() == 0) == (experts == 0)


@pytest.mark.parametrize("drop", [False, True])
def test_all_but_dense_weights_is_given_back_when_it_is_open(
    drop: bool, packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening reads the weights that the kernels packed once more, too, and nobody reads those again."""
    directory, given = packed(), list[tuple[int, int]]()

    def noted(_: MappedFile, offset: int, length: int, *, cache: bool) -> None:
        assert cache == drop
        given.append((offset, offset + length))

    monkeypatch.setattr(MappedFile, "give_back", noted)
    places = places_of(directory)
    PagedRunner(directory, lambda: 10**9, threads=1, drop_cache=drop)
    touched = np.zeros((directory / "model.onnx_data").stat().st_size, bool)
    for start, stop in given:
        touched[start:stop] = True
    dense = np.zeros_like(touched)
    for place in places.dense:
        dense[place.offset : place.offset + place.length] = True
    assert 0 < dense.sum() < touched.size / 2
    np.testing.assert_array_equal(touched, ~dense)


def test_exactly_what_is_missing_is_read_and_what_is_old_given_back(
    packed: Packed, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = packed()
    layers = places_of(directory).layers
    size, said = layers[0].size, list[tuple[str, int, int]]()
    runner = PagedRunner(directory, lambda: 6 * size, threads=1)
    monkeypatch.setattr(MappedFile, "read_ahead", lambda _, offset, length: said.append(("read", offset, length)))
    monkeypatch.setattr(
        MappedFile, "give_back", lambda _, offset, length, **__: said.append(("give", offset, length)) if length else 0
    )
    pager = runner.session.pager
    assert pager is not None

    def step(*experts: list[int]) -> None:
        values = {}
        for row, used in zip(layers, experts, strict=True):
            values[row.indices] = np.array([used], np.int64)
            values[row.weights] = np.ones((1, len(used)), np.float32)
        said.clear()
        one = Step(values)
        pager.begin(one)
        pager.end(one)

    def ranges(layer: int, first: int, number: int = 1) -> list[tuple[int, int]]:
        return [(place.offset, place.length) for place in layers[layer].places(first, number)]

    def done(what: str) -> list[tuple[int, int]]:
        return [(offset, length) for said_, offset, length in said if said_ == what]

    step([0, 1], [2, 3])
    assert done("read") == [*ranges(0, 0), *ranges(0, 1), *ranges(1, 2), *ranges(1, 3)]
    step([0, 1], [2, 3])
    assert said == []
    step([4, 5], [2, 3])
    assert done("read") == [*ranges(0, 4), *ranges(0, 5)]
    assert not set(ranges(0, 0) + ranges(0, 1)) & set(done("give")), "memory holds six"
    step([4, 5], [0, 2])
    assert done("read") == ranges(1, 0)
    # The one that was used least recently goes, with what lies beside it as far as nothing is held there.
    assert done("give")[:2] == ranges(0, 0)
    assert done("give")[2:] == ranges(1, 1)
    step([4, 5], [2, 5])
    assert done("read") == ranges(1, 5)
    assert layers[1].count == 8
    assert done("give") == [*ranges(0, 0, 4), *ranges(1, 4), *ranges(1, 6, 2)], "3, 4 and 5 are held"


def test_forks_and_batches_of_them(packed: Packed) -> None:
    directory = packed()
    size = places_of(directory).layers[0].size
    results = []
    for runner in (OnnxRunner(directory, threads=1), PagedRunner(directory, lambda: 2 * size, threads=1)):
        first, second = runner.fork(), runner.fork()
        first.prefill(IDS[:1, :9])
        second.prefill(IDS[1:, :5])
        rows = runner.gather([Row(first), Row(second)])
        mask = np.ones((2, 10), np.int64)
        for number, row in enumerate(rows):
            mask[number, : row.padding] = 0
        results.append(runner.decode(IDS[:, 9:10], mask))
    np.testing.assert_array_equal(*results)


def test_threads_may_run_forks_at_the_same_time(packed: Packed) -> None:
    directory = packed()
    size = places_of(directory).layers[0].size
    runner = PagedRunner(directory, lambda: 3 * size, threads=1)
    want = OnnxRunner(directory, threads=1).prefill(IDS[:1])
    found: list[np.ndarray] = []

    def run(own: OnnxRunner) -> None:
        found.extend(own.prefill(IDS[:1]) for _ in range(5))

    threads = [threading.Thread(target=run, args=(runner.fork(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for one in found:
        np.testing.assert_array_equal(one, want)
    assert runner.paging.uses.sum() > 0


def test_the_thread_ends_with_the_runner(packed: Packed) -> None:
    def pagers() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name == "pager"]

    before = pagers()
    runner = PagedRunner(packed(), lambda: 0, threads=1)
    (own,) = set(pagers()) - set(before)
    del runner
    own.join(timeout=10)
    assert not own.is_alive()


def test_a_model_whose_steps_fail_still_ends_them(packed: Packed) -> None:
    runner = PagedRunner(packed(), lambda: 0, threads=1)
    session = runner.session._session

    class Failing:
        def __getattr__(self, name: str) -> Any:
            return getattr(session, name)

        def run_with_iobinding(self, _: Any) -> None:
            raise RuntimeError("no")

    runner.session._session = Failing()
    with pytest.raises(ArtifactError, match="cannot run"):
        runner.prefill(IDS)
    runner.session._session = session
    assert runner.session.pager is not None
    assert not runner.session.pager._running
    runner.prefill(IDS)


def test_weights_that_are_not_packed_for_this_machine_are_refused(packed: Packed) -> None:
    with pytest.raises(ArtifactError, match="does not map the experts"):
        PagedRunner(packed().parent / "out", lambda: 0, threads=1)


def test_dense_weights_that_cannot_be_locked_are_a_note(packed: Packed, monkeypatch: pytest.MonkeyPatch) -> None:
    assert PagedRunner(packed(), lambda: 0).note == ""
    monkeypatch.setattr(MappedFile, "lock", lambda *_: "not permitted")
    assert PagedRunner(packed(), lambda: 0).note == "dense weights are not locked in memory: not permitted"


def test_places_are_all_that_kernels_read(packed: Packed) -> None:
    """Expert by expert, without gaps; what lies before packed weights are the originals, which no kernel reads."""
    for directory in (packed(), packed().parent / "out"):
        found = places_of(directory)
        assert found.packed == (directory.name == "packed")
        size = (directory / "model.onnx_data").stat().st_size
        every = [*found.dense, *found.tables, *(place for row in found.layers for place in row.stacks)]
        assert len({place.offset for place in every}) == len(every)
        assert all(place.offset >= 0 and place.offset + place.length <= size for place in every)
        if directory.name == "out":
            assert sum(place.length for place in every) > 0.95 * size
        for row in found.layers:
            pieces = [list(row.places(expert)) for expert in range(row.count)]
            assert sum(place.length for one in pieces for place in one) == sum(place.length for place in row.stacks)
            for number, stack in enumerate(row.stacks):
                assert [one[number].offset for one in pieces] == [
                    stack.offset + expert * stack.length // row.count for expert in range(row.count)
                ]


def test_experts_that_no_kernel_computes_are_refused(golden_onnx: Path) -> None:
    with pytest.raises(UsageError, match="not computed by ONNX Runtime's kernels for experts") as caught:
        OnnxTarget().weight_sizes(golden_onnx)
    assert "--quantize int4" in caught.value.hint


def test_other_targets_do_not_leave_experts_on_the_disk(tmp_path: Path) -> None:
    from moec.targets import get_target

    for name in ("tflite", "coreml"):
        target: Any = get_target(name)
        with pytest.raises(UsageError, match=f"the {name} target does not leave experts on the disk"):
            target.weight_sizes(tmp_path)
        with pytest.raises(UsageError, match="does not leave experts on the disk"):
            target.open_paged(tmp_path, lambda: 0)
