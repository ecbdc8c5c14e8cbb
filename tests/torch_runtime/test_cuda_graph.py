"""Steps that are recorded once: their memory, their cache, and recordings that fail or are interrupted."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import weakref
from collections.abc import Iterator, Sequence

import pytest
import torch
from small_denoiser import random_denoiser
from torch import Tensor

from sana_edge.errors import SanaError
from sana_edge.nets.denoiser import Denoiser, Modulation
from sana_edge.nets.text_context import TextContext
from sana_edge.nets.text_encoder import TextFeatures
from sana_edge.torch_runtime import cuda_graph
from sana_edge.torch_runtime.cuda_graph import Run, StepGraph
from sana_edge.torch_runtime.steps import FusedNetwork, Network, PlainNetwork, Predictor

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


class Recorder:
    """What a graph does, on a CPU: the function runs at recording only with the graph's own tensors."""

    def __init__(self) -> None:
        self.recorded = 0

    def __call__(self, run: Run) -> Run:
        self.recorded += 1
        result = run()

        def replay() -> Tensor:
            result.copy_(run())
            return result

        return replay


def weighted(step: Sequence[Tensor], prompt: Sequence[Tensor]) -> Tensor:
    return step[0] * 10 + prompt[0]


def test_inputs_are_copied_to_where_the_recording_reads_them() -> None:
    one, two = torch.ones(3), torch.full((3,), 2.0)
    graph = StepGraph(weighted, [one], [two], Recorder())
    assert graph([one]).tolist() == [12, 12, 12]
    one.fill_(5)
    assert graph([two]).tolist() == [22, 22, 22]
    graph.load([torch.full((3,), 7.0)])
    first = graph([two])
    assert first.tolist() == [27, 27, 27] and two.tolist() == [2, 2, 2]
    # one tensor, of every call
    assert graph([one]) is first


def test_other_shapes_are_a_mistake() -> None:
    graph = StepGraph(weighted, [torch.ones(3)], [torch.ones(3)], cuda_graph.eager)
    with pytest.raises(ValueError, match="other shapes"):
        graph([torch.ones(4)])
    with pytest.raises(ValueError, match="other shapes"):
        graph.load([torch.ones(1)])


def test_without_a_recording_it_runs_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(run: Run) -> Run:
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    with caplog.at_level(logging.WARNING, "sana_edge"):
        graph = StepGraph(weighted, [torch.ones(1)], [torch.ones(1)], refuse)
    assert graph.note.endswith(
        "without a CUDA graph: CUDA error: operation not permitted when stream is capturing"
    )
    assert graph.note in caplog.text
    assert graph([torch.full((1,), 3.0)]).item() == 31


def test_memory_that_runs_out_in_a_capture_is_told_as_such() -> None:
    def record(run: Run) -> Run:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(torch.OutOfMemoryError):
        StepGraph(weighted, [torch.ones(1)], [torch.ones(1)], record)


def test_an_interrupted_replay_leaves_the_graph_usable() -> None:
    interrupted = [False]

    def stop(step: Sequence[Tensor], prompt: Sequence[Tensor]) -> Tensor:
        if interrupted[0]:
            raise KeyboardInterrupt
        return weighted(step, prompt)

    graph = StepGraph(stop, [torch.ones(1)], [torch.ones(1)], Recorder())
    interrupted[0] = True
    with pytest.raises(KeyboardInterrupt):
        graph([torch.full((1,), 9.0)])
    interrupted[0] = False
    assert graph([torch.ones(1)]).item() == 11


class StandIn:
    """torch.cuda as a capture sees it: what is asked of it in order, and ends that fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools, self.used, self.broken_end = 0, [], False
        stand_in = self

        class Graph:
            def replay(self) -> None:
                pass

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        @contextlib.contextmanager
        def capture(graph: Graph, **mode: object) -> Iterator[None]:
            stand_in.used.append(mode["pool"])
            try:
                yield
            finally:
                if stand_in.broken_end:
                    raise RuntimeError("operation failed due to a previous error during capture")

        def pool() -> int:
            stand_in.pools += 1
            return stand_in.pools

        replaced = {"CUDAGraph": Graph, "Stream": Stream, "graph": capture, "graph_pool_handle": pool}
        replaced["current_stream"] = Stream
        replaced["set_stream"] = lambda stream: None
        replaced["stream"] = replaced["device"] = lambda which: contextlib.nullcontext()
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(cuda_graph._Process, "stopped", "")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    return StandIn(monkeypatch)


def failing(kind: BaseException, until: int) -> tuple[Run, list[int]]:
    calls = [0]

    def run() -> Tensor:
        calls[0] += 1
        if calls[0] == until:
            raise kind
        return torch.ones(1)

    return run, calls


def test_after_a_failed_capture_nothing_is_recorded(stand_in: StandIn) -> None:
    """The note says why, of another model's steps too."""
    stand_in.broken_end = True
    # the third run is the one in the capture
    run, _ = failing(RuntimeError("operation not permitted"), 3)
    with pytest.raises(RuntimeError, match="previous error"):
        cuda_graph.CudaGraphs()(run)
    stand_in.broken_end = False
    assert cuda_graph.refusal() == "a capture failed in this process: operation not permitted"
    graph = StepGraph(weighted, [torch.ones(1)], [torch.ones(1)], cuda_graph.CudaGraphs())
    assert cuda_graph.refusal() in graph.note
    assert graph([torch.ones(1)]).item() == 11 and len(stand_in.used) == 1


def test_a_capture_that_ends_well_does_not_stop_recording(stand_in: StandIn) -> None:
    run, _ = failing(torch.OutOfMemoryError("CUDA out of memory."), 3)
    recorder = cuda_graph.CudaGraphs()
    with pytest.raises(torch.OutOfMemoryError):
        recorder(run)
    assert cuda_graph.refusal() == ""
    recorder(run)


def test_graphs_that_are_gone_leave_their_pool_to_results(stand_in: StandIn) -> None:
    """A pool is shared while one of its graphs lives; torch refuses one that only tensors are left of."""
    recorder = cuda_graph.CudaGraphs()
    runs = [recorder(lambda: torch.ones(1)) for _ in range(2)]
    kept = runs[0]()
    assert stand_in.used == [1, 1]
    runs.clear()
    gc.collect()
    recorder(lambda: torch.ones(1))
    assert stand_in.used == [1, 1, 2] and kept.item() == 1


@pytest.mark.parametrize(
    ("version", "trusted"), [("2.6.0+cu124", False), ("2.7.0", True), ("2.11.0a1", True)]
)
def test_torch_that_records(version: str, trusted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    assert (cuda_graph.refusal() == "") is trusted
    if not trusted:
        graph = StepGraph(weighted, [torch.ones(1)], [torch.ones(1)], cuda_graph.CudaGraphs())
        assert "without a CUDA graph: torch 2.6.0+cu124 is older than 2.7" in graph.note


def test_errors_of_the_library_and_of_triton_in_a_capture(stand_in: StandIn) -> None:
    run, _ = failing(SanaError("w8a8_linear: refused"), 3)
    graph = StepGraph(lambda step, prompt: run(), [torch.ones(1)], [], cuda_graph.CudaGraphs())
    assert graph.note.endswith("without a CUDA graph: w8a8_linear: refused")
    assert graph([torch.ones(1)]).item() == 1
    kind = type("OutOfResources", (Exception,), {"__module__": "triton.runtime.errors"})
    run, _ = failing(kind("out of resource: shared memory"), 3)
    graph = StepGraph(lambda step, prompt: run(), [torch.ones(1)], [], cuda_graph.CudaGraphs())
    assert "OutOfResources: out of resource: shared memory" in graph.note


def test_an_error_of_triton_in_a_step() -> None:
    kind = type("CompilationError", (Exception,), {"__module__": "triton.compiler.errors"})
    run, _ = failing(kind("at 3:4"), 1)
    graph = StepGraph(lambda step, prompt: run(), [torch.ones(1)], [], cuda_graph.eager)
    with pytest.raises(SanaError, match=r"Triton kernel cannot run: CompilationError: at 3:4"):
        graph([torch.ones(1)])


def context(denoiser: Denoiser, *lengths: int) -> TextContext:
    groups = [TextFeatures(torch.randn(1, n, 40), torch.ones(1, n)) for n in lengths]
    return denoiser.text_context(groups)


def networks(denoiser: Denoiser) -> dict[str, Network]:
    return {
        "plain": PlainNetwork(denoiser),
        "padded": PlainNetwork(denoiser, 64),
        "fused": FusedNetwork(denoiser, "torch"),
    }


def expected(
    denoiser: Denoiser, x: Tensor, step: Modulation, text: TextContext, guidance: float | None
) -> Tensor:
    if guidance is None:
        velocity: Tensor = denoiser(x, step, text)
        return velocity
    unguided, prompted = denoiser(torch.cat([x, x]), step, text).chunk(2)
    return unguided + guidance * (prompted - unguided)


@pytest.mark.parametrize("kind", ["plain", "padded", "fused"])
@pytest.mark.parametrize("guidance", [None, 4.5])
def test_prompts_and_sizes(kind: str, guidance: float | None) -> None:
    """Of several sizes and texts in turn, each velocity is the denoiser's; 1 % as in test_fused_denoiser."""
    denoiser = random_denoiser()
    predictor, tables = (
        Predictor(networks(denoiser)[kind], Recorder()),
        denoiser.modulation(torch.tensor([900.0, 30.0])),
    )
    for size, length in (((4, 6), 7), ((3, 5), 7), ((4, 6), 12), ((4, 6), 7)):
        text = context(denoiser, length) if guidance is None else context(denoiser, 1, length)
        x = torch.randn(1, 8, *size)
        velocity, note = predictor.start(x, tables, text, guidance)
        assert note == ""
        for i in range(2):
            wanted = expected(denoiser, x, tables[i], text, guidance)
            assert (velocity(x, i) - wanted).norm() <= 0.01 * wanted.norm()
            x = x - 0.1 * wanted


@pytest.mark.parametrize(("kind", "recordings"), [("plain", 3), ("padded", 2), ("fused", 1)])
def test_a_recording_serves_other_prompts(kind: str, recordings: int) -> None:
    denoiser, recorder = random_denoiser(), Recorder()
    predictor, tables = (
        Predictor(networks(denoiser)[kind], recorder),
        denoiser.modulation(torch.tensor([900.0])),
    )
    for length in (7, 64, 150):
        x = torch.randn(1, 8, 4, 6)
        velocity, _ = predictor.start(x, tables, context(denoiser, 1, length), 3.0)
        velocity(x, 0)
    assert recorder.recorded == recordings
    # another guidance is another number, none is another recording
    predictor.start(x, tables, context(denoiser, 1, 150), 5.0)
    assert recorder.recorded == recordings
    predictor.start(x, tables, context(denoiser, 150), None)
    assert recorder.recorded == recordings + 1
    predictor.release()
    predictor.start(x, tables, context(denoiser, 150), None)
    assert recorder.recorded == recordings + 2


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), KeyboardInterrupt()])
def test_what_ends_a_recording_is_not_kept(error: BaseException) -> None:
    denoiser, failing = random_denoiser(), [True]

    def record(run: Run) -> Run:
        if failing:
            raise error
        return run

    predictor = Predictor(PlainNetwork(denoiser), record)
    x, tables, text = (
        torch.randn(1, 8, 4, 6),
        denoiser.modulation(torch.tensor([900.0])),
        context(denoiser, 5),
    )
    with pytest.raises(type(error)):
        predictor.start(x, tables, text, None)
    assert len(predictor._graphs) == 0
    failing.clear()
    velocity, _ = predictor.start(x, tables, text, None)
    assert torch.equal(velocity(x, 0), denoiser(x, tables[0], text)) and len(predictor._graphs) == 1


def test_the_size_used_longest_ago_is_dropped() -> None:
    denoiser, recorder = random_denoiser(), Recorder()
    predictor, tables = Predictor(PlainNetwork(denoiser), recorder), denoiser.modulation(torch.tensor([9.0]))
    recorded = []
    for width in (3, 4, 5, 3, 6, 3, 4):
        velocity, _ = predictor.start(torch.zeros(1, 8, 2, width), tables, context(denoiser, 5), None)
        recorded.append(recorder.recorded)
    assert recorded == [1, 2, 3, 3, 4, 4, 5] and len(predictor._graphs) == 3
    # a velocity outlives its graph
    predictor.release()
    assert len(predictor._graphs) == 0
    assert velocity(torch.zeros(1, 8, 2, 4), 0).shape == (1, 8, 2, 4) and recorder.recorded == 6


def test_two_predictors_at_once() -> None:
    """Each has memory of its own: taken in turn, step by step, they do not meet."""
    denoiser, x = random_denoiser(), torch.randn(1, 8, 4, 6)
    tables, texts = denoiser.modulation(torch.tensor([900.0, 30.0])), [context(denoiser, n) for n in (5, 9)]
    alone = []
    for text in texts:
        velocity, _ = Predictor(FusedNetwork(denoiser, "torch"), Recorder()).start(x, tables, text, None)
        alone.append([velocity(x, i).clone() for i in range(2)])
    both = [
        Predictor(FusedNetwork(denoiser, "torch"), Recorder()).start(x, tables, text, None) for text in texts
    ]
    for i in range(2):
        for k, (velocity, _) in enumerate(both):
            assert torch.equal(velocity(x, i), alone[k][i])


def cuda_predictor(denoiser: Denoiser, recorder: cuda_graph.Recorder) -> Predictor:
    return Predictor(PlainNetwork(denoiser, 64), recorder)


def test_a_graph_keeps_what_its_function_reads() -> None:
    """A recording reads memory that only the function knows, and does not keep the function itself."""

    class Held:
        pass

    def make() -> tuple[StepGraph, weakref.ref[Held]]:
        held = Held()

        def function(step: Sequence[Tensor], prompt: Sequence[Tensor]) -> Tensor:
            assert held is not None
            return step[0]

        def recorder(run: Run) -> Run:
            result = run()
            return lambda: result

        return StepGraph(function, [torch.zeros(1)], [], recorder), weakref.ref(held)

    graph, held = make()
    gc.collect()
    assert held() is not None
    del graph
    gc.collect()
    assert held() is None


@pytest.mark.gpu
@GPU
def test_replay_equals_eager_on_a_gpu() -> None:
    denoiser = random_denoiser().to_compute("cuda", torch.float16)
    tables = denoiser.modulation(torch.tensor([900.0, 30.0], device="cuda"))
    text = TextFeatures(torch.randn(1, 7, 40, device="cuda"), torch.ones(1, 7, device="cuda"))
    x, read = torch.randn(1, 8, 12, 20, device="cuda"), denoiser.text_context([text])
    results = []
    for recorder in (cuda_graph.eager, cuda_graph.CudaGraphs()):
        velocity, note = cuda_predictor(denoiser, recorder).start(x, tables, read, None)
        assert note == ""
        results.append([velocity(x, i).clone() for i in range(2)])
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)


@pytest.mark.gpu
@GPU
def test_two_streams_on_a_gpu() -> None:
    denoiser = random_denoiser().to_compute("cuda", torch.float16)
    tables = denoiser.modulation(torch.tensor([500.0], device="cuda"))
    text = TextFeatures(torch.randn(1, 7, 40, device="cuda"), torch.ones(1, 7, device="cuda"))
    read, latents = denoiser.text_context([text]), torch.randn(2, 1, 8, 12, 20, device="cuda")
    wanted = [denoiser(x, tables[0], read) for x in latents]
    same: list[bool] = []

    def work(k: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
            velocity, _ = cuda_predictor(denoiser, cuda_graph.CudaGraphs()).start(
                latents[k], tables, read, None
            )
            same.append(all(torch.allclose(velocity(latents[k], 0), wanted[k], atol=1e-2) for _ in range(50)))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    torch.cuda.synchronize()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True, True]


@pytest.mark.gpu
@GPU
def test_nothing_is_allocated_by_a_replay() -> None:
    denoiser = random_denoiser().to_compute("cuda", torch.float16)
    tables = denoiser.modulation(torch.tensor([500.0], device="cuda"))
    text = TextFeatures(torch.randn(1, 7, 40, device="cuda"), torch.ones(1, 7, device="cuda"))
    x, read = torch.randn(1, 8, 12, 20, device="cuda"), denoiser.text_context([text])
    velocity, _ = cuda_predictor(denoiser, cuda_graph.CudaGraphs()).start(x, tables, read, None)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(3):
        velocity(x, 0)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
