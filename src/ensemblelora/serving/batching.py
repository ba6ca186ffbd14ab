"""Requests that come together are answered together: one queue, bounded, and one thread that has the model.

In: questions, one by one, from one event loop. Out: each one's answers, or a :class:`~.limits.Refusal`. While the model
is busy, what comes waits; the next batch takes what has come by then. No torch, no web framework.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ensemblelora.serving.limits import Limits, Refusal

if TYPE_CHECKING:
    from ensemblelora.answers import Prediction, Question

__all__ = ["Answer", "Batcher"]

Answer = Callable[[Sequence["Question"]], "Sequence[list[Prediction] | Exception]"]
"""answers questions together, in another thread; a question at fault has an error in place of its answers"""


@dataclass(frozen=True, eq=False)
class _Job:
    question: Question
    answers: asyncio.Future[list[Prediction]]

    @property
    def n_rows(self) -> int:
        return len(self.question.rows)


class Batcher:
    """The queue in front of a model."""

    def __init__(self, answer: Answer, limits: Limits, *, observe: Callable[[int, float], None]) -> None:
        """``observe`` is told the rows and seconds of every batch."""
        self._answer, self._limits, self._observe = answer, limits, observe
        self._waiting: deque[_Job] = deque()
        self._something_came, self._is_enough = asyncio.Event(), asyncio.Event()
        self._is_open, self._is_patient = False, True

    @property
    def n_waiting_rows(self) -> int:
        """Rows that no batch has taken yet."""
        return sum(job.n_rows for job in self._waiting)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Answer what comes inside; on leaving, what was accepted is answered first, and nothing new accepted."""
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="model") as thread:
            self._is_open = True
            work = asyncio.create_task(self._work(thread))
            try:
                yield
            finally:
                self._is_open = False
                self.hurry()
                self._something_came.set()
                await work

    def hurry(self) -> None:
        """From now on, let no batch wait for more rows: the server is to stop."""
        self._is_patient = False
        self._is_enough.set()

    async def submit(self, question: Question) -> list[Prediction]:
        """Wait for a question's answers.

        Raises:
            Refusal: If too many rows wait already, the answer is not there in time, or the server is stopping.
            Exception: What answering the question raised.
        """
        job = _Job(question, asyncio.get_running_loop().create_future())
        n_waiting, most = self.n_waiting_rows, self._limits.max_waiting_rows
        if not self._is_open:
            raise Refusal("stopping", "the server is stopping; ask another one, or later", status=503)
        if n_waiting + job.n_rows > most:
            told = f"overloaded: {n_waiting} rows are waiting and at most {most} may; try again later"
            raise Refusal("overload", told, status=503)
        self._waiting.append(job)
        self._something_came.set()
        if self.n_waiting_rows >= self._limits.max_batch_rows:
            self._is_enough.set()
        try:
            done, _ = await asyncio.wait({job.answers}, timeout=self._limits.timeout_seconds)
        finally:
            if job in self._waiting:  # whoever asked has gone
                self._waiting.remove(job)
        if not done:
            job.answers.cancel()
            told = f"not answered within {self._limits.timeout_seconds:g} s; send fewer rows, or try again later"
            raise Refusal("timeout", told, status=504)
        return job.answers.result()

    async def _work(self, thread: ThreadPoolExecutor) -> None:
        while self._is_open or self._waiting:
            await self._something_came.wait()
            await self._wait_for_more()
            jobs = self._take()
            if jobs:
                await self._carry_out(jobs, thread)
            elif self._is_open:
                self._something_came.clear()

    async def _wait_for_more(self) -> None:
        """Give a batch that isn't full a moment to fill."""
        if self._is_patient and 0 < self.n_waiting_rows < self._limits.max_batch_rows:
            self._is_enough.clear()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._is_enough.wait(), self._limits.batch_wait_ms / 1000)

    def _take(self) -> list[_Job]:
        """The oldest jobs, as many as fit a batch, at least one."""
        jobs: list[_Job] = []
        room = self._limits.max_batch_rows
        while self._waiting and (not jobs or self._waiting[0].n_rows <= room):
            jobs.append(self._waiting.popleft())
            room -= jobs[-1].n_rows
        return jobs

    async def _carry_out(self, jobs: Sequence[_Job], thread: ThreadPoolExecutor) -> None:
        started, loop = time.perf_counter(), asyncio.get_running_loop()
        answers: Sequence[list[Prediction] | Exception]
        try:
            answers = await loop.run_in_executor(thread, self._answer, [job.question for job in jobs])
        except Exception as error:
            answers = [error] * len(jobs)
        self._observe(sum(job.n_rows for job in jobs), time.perf_counter() - started)
        for job, answer in zip(jobs, answers, strict=True):
            if job.answers.done():  # given up on
                continue
            if isinstance(answer, Exception):
                job.answers.set_exception(answer)
            else:
                job.answers.set_result(answer)
