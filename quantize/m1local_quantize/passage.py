"""The source passing by, stage by stage: each is written, measured and let go.

What it is: the order of events. A stage is the embedding, a layer, or the end (norm and head);
when it is written, the original and what was made of it are passed side by side, and source files
that no later stage reads are let go. What it is not: the arithmetic (convert.py, certificate.py).
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from m1local.manifest import FileRecord
from m1local_quantize.calibration import Written
from m1local_quantize.certificate import Measurement, StageMeasured, certificate
from m1local_quantize.convert import Converter
from m1local_quantize.journal import HIDDEN, Journal
from m1local_quantize.plan import Plan, Step
from m1local_quantize.shard_writer import ShardWriter
from m1local_quantize.source import Source
from m1local_quantize.stream import stage_of
from m1local_quantize.text import Text
from m1local_quantize.transfer import BytesFetched

MOST_PENDING = 8  # parts that wait for the disk


@dataclass(frozen=True, slots=True)
class TensorWritten:
    """One tensor of the source is done."""

    name: str
    done_bytes: int  # of the source
    total_bytes: int


Passed = TensorWritten | StageMeasured | BytesFetched


class Passage:
    """One run over a source; `quality` is the certificate, once it has ended.

    `records` are sizes and hashes of the files that this run has written.
    """

    def __init__(
        self,
        source: Source,
        target: Path,
        plan: Plan,
        journal: Journal,
        *,
        measured_on: Text | None,
        calibrated_on: Text | None,
    ) -> None:
        """Begin, or go on where `journal` and the kept hidden states say."""
        self.quality: Mapping[str, str | int | float] | None = None
        self.records: dict[str, FileRecord] = {}
        self._source, self._target, self._plan, self._journal = source, target, plan, journal
        self._layers = source.config.num_hidden_layers
        self._pending: deque[Future[None]] = deque()
        self._failed = False
        self._converter = Converter(source, target, plan, calibrated_on)
        self._text, self._measurement = measured_on, None
        if measured_on is not None:
            written = Written(target, plan)
            self._measurement = Measurement(source, written, plan.linears, measured_on)
            if source.files.passing:
                self._measurement.restore(target / HIDDEN)
        self._stages: dict[int, list[Step]] = {}
        for step in plan.steps:
            self._stages.setdefault(stage_of(step.name, self._layers), []).append(step)
        source.files.expect([self._stored(step) for step in plan.steps if self._needs(step)])

    def run(self) -> Iterator[Passed]:
        """Write what is missing, in order; the disk gets a matrix while the next is computed."""
        with ThreadPoolExecutor(max_workers=1) as self._storing:
            yield from self._run()

    def _run(self) -> Iterator[Passed]:
        done = 0
        for file_name, steps in self._plan.shards.items():
            path = self._target / file_name
            layout = {name: stored for step in steps for name, stored in step.tensors.items()}
            is_whole = path.is_file()
            with (
                (
                    nullcontext() if is_whole else ShardWriter(path, layout, self._journal.finished)
                ) as writer,
                self._settled(),
            ):
                for step in steps:
                    stage = stage_of(step.name, self._layers)
                    if step is self._stages[stage][0]:
                        yield from self._arrive(stage)
                    if writer is not None and not self._journal.has(step):
                        self._write(writer, step)
                    done += self._source.nbytes(step.name)
                    yield TensorWritten(step.name, done, self._plan.source_bytes)
                    yield from self._source.files.fetch(())
                    if step is self._stages[stage][-1]:
                        yield from self._leave(stage)
            if writer is not None and writer.record is not None:
                self.records[file_name] = writer.record

    def close(self) -> None:
        """Let go of all that is left of the source, after the checkpoint is whole."""
        (self._target / HIDDEN).unlink(missing_ok=True)
        self._source.files.release(list(self._source.files.files))

    def _needs(self, step: Step) -> bool:
        """Whether this run still reads what `step` is made of."""
        stage = stage_of(step.name, self._layers)
        unwritten = not all(self._journal.has(other) for other in self._stages[stage])
        unmeasured = self._measurement is not None and (
            self._measurement.passed <= stage or stage > self._layers
        )
        return unwritten or unmeasured

    def _stored(self, step: Step) -> str:
        return self._source.stored_name(step.name)

    def _arrive(self, stage: int) -> Iterator[BytesFetched]:
        steps = [step for step in self._stages[stage] if self._needs(step)]
        return self._source.files.fetch([self._stored(step) for step in steps])

    def _write(self, writer: ShardWriter, step: Step) -> None:
        """Begin to write what becomes of `step`, part by part while the next is computed."""
        finished, checksums = set(self._journal.finished), {}

        def store(name: str, part: Tensor) -> None:
            checksum = writer.write(name, part)
            if checksum is not None:
                checksums[name] = checksum

        for name, part in self._converter.convert(step):
            if name not in finished:
                self._store(store, name, part)
        self._store(self._journal.add, checksums)

    def _store(self, work: Callable[..., None], *arguments: object) -> None:
        """Let the storing thread do `work` after all before; wait where it is far behind."""

        def attempt() -> None:
            if self._failed:  # whoever waits is about to hear of it
                return
            try:
                work(*arguments)
            except BaseException:
                self._failed = True
                raise

        self._settle(MOST_PENDING)
        self._pending.append(self._storing.submit(attempt))

    def _settle(self, most: int = 0) -> None:
        """Wait until what was computed is written, but for the last `most` parts."""
        while len(self._pending) > most:
            self._pending.popleft().result()

    @contextmanager
    def _settled(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._settle()

    def _leave(self, stage: int) -> Iterator[StageMeasured]:
        self._settle()
        last = stage > self._layers
        if self._measurement is not None and self._text is not None:
            while self._measurement.passed <= stage:
                self._measurement.advance()
            yield StageMeasured(stage + 1, self._layers + 2)
            if last:
                self.quality = certificate(self._measurement.result(), self._text)
        if last:  # its files go when the manifest is there
            return
        later = [s for number, steps in self._stages.items() if number > stage for s in steps]
        kept = {self._source.files.file_of(self._stored(step)) for step in later}
        gone = [file for file in self._source.files.files if file not in kept]
        if self._source.files.passing and gone:
            if self._measurement is not None:
                self._measurement.save(self._target / HIDDEN)
            self._source.files.release(gone)
