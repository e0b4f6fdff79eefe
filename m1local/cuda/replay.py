"""Work that a card is given again and again: as a captured graph, or as it is with a reason.

What it is: the one place that captures. What it is not: aware of what the work is.
"""

from collections.abc import Callable

import torch

WARM_UPS = 2  # Triton compiles at the first launch, which must not be captured


class Replay:
    """Work that is launched again and again: as a captured graph, or as it is with a reason."""

    def __init__(
        self,
        work: Callable[[], None],
        device: torch.device,
        prepare: Callable[[], object] = lambda: None,
    ) -> None:
        """Capture `work`, after it ran a few times, each time after `prepare`."""
        self._launch, self.reason = work, ""
        if device.type != "cuda":
            self.reason = f"no graphs on {device.type}"
            return
        try:
            self._launch = captured(work, prepare)
        except RuntimeError as error:  # what cannot be captured can still be launched
            said = str(error) or type(error).__name__
            self.reason = f"capturing failed: {said.splitlines()[0]}"

    def __call__(self) -> None:
        """Launch it once."""
        self._launch()


def captured(work: Callable[[], None], prepare: Callable[[], object]) -> Callable[[], None]:
    """`work` as a CUDA graph's replay."""
    current = torch.cuda.current_stream()
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            prepare()
            work()
    current.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # Where capturing fails torch leaves the thread on the graph's stream: the outer one takes it
    # back. What other threads do with the card meanwhile is no business of the capture.
    with (
        torch.cuda.stream(current),
        torch.cuda.graph(graph, capture_error_mode="thread_local"),
    ):
        work()
    return graph.replay
