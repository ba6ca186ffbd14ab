"""The paper's analyses at a processor's scale: the expansion, transfer, sharpness, similarity.

    python benchmarks/analysis.py linearization --minutes 15     # or transfer, sharpness, similarity
    python benchmarks/analysis.py all --minutes 70               # one after the other

Every analysis is ``ensemblelora analyze`` in steps, of which each asks for all that the former did and for more; what
was trained and measured before is found again. After every step ``results/analysis-NAME.json`` is written; it has the
whole result, what it cost, the steps that are left, and the paper's tables and figures that are made of it. Stopped, or
out of minutes, the same command goes on with the first step that is not finished.

* One thread, unless ``--threads`` says otherwise: seconds are those of one core.
* ``transfer`` and ``similarity`` use each other's fine-tunings; the recipes tell how long each step takes.
* ``ensemblelora reproduce table5 benchmarks/results/analysis-linearization.json`` reads a record as it would a folder.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import keep_record

from ensemblelora.analysis.page import write_page
from ensemblelora.analysis.record import (
    carry_out,
    find_analysis,
    find_result,
    make_request,
    read_options,
    read_result,
)
from ensemblelora.analysis.request import AnalysisRequest
from ensemblelora.errors import UsageError
from ensemblelora.recipe import read_request
from ensemblelora.reproduction.tables import reproduce

RECIPES = Path(__file__).parents[1] / "recipes"
_DIGITS = 6


@dataclass(frozen=True)
class Step:
    """One more thing that an analysis is asked for."""

    title: str
    options: tuple[str, ...]
    """all that differ from the study's, the former steps' included"""
    n_seeds: int = 1


@dataclass(frozen=True)
class Study:
    """One analysis: its recipe, its part of the minutes of all, what all steps share, the steps, what they make."""

    recipe: str
    minutes: float
    options: tuple[str, ...]
    steps: tuple[Step, ...]
    exhibits: tuple[str, ...]


def _expand(base_methods: str, ranks: str, epochs: str) -> tuple[str, ...]:
    return f"base_methods={base_methods}", f"ranks={ranks}", f"epochs={epochs}"


def _transfer(pairs: int, methods: str) -> tuple[str, ...]:
    return f"pairs={pairs}", f"methods={methods}"


_SHORT = ("tasks=[rte_cut, copa_cut]", "targets=[rte_cut:cb_cut, copa_cut:story_cloze]")
_LONG = (
    "tasks=[rte_cut, copa_cut, boolq]",
    "targets=[rte_cut:cb_cut, copa_cut:story_cloze, boolq:multirc]",
)
_ONE_SCALE, _TWO_SCALES = "scalings=[proportional]", "scalings=[proportional, fixed]"

STUDIES: Mapping[str, Study] = {
    "linearization": Study(
        "analysis-cpu.yaml",
        15.0,
        ("n_subsets=3", "subset_size=2", "max_rows=6"),
        (
            Step("LoRA of rank 8, 1 and 3 epochs", _expand("[]", "[]", "[1, 3]")),
            Step("ranks 1 and 32", _expand("[]", "[1, 8, 32]", "[1, 3]")),
            Step("bottleneck adapters", _expand("[lora, bottleneck]", "[1, 8, 32]", "[1, 3]")),
            Step("10 epochs", _expand("[lora, bottleneck]", "[1, 8, 32]", "[1, 3, 10]")),
        ),
        ("table2", "table5", "figure2"),
    ),
    "transfer": Study(
        "analysis-cpu.yaml",
        25.0,
        ("base_methods=[lora]", "averages=[plain]", "shortest=true", "pair_seeds=1"),
        (
            Step("every task alone, all together", _transfer(0, "[]")),
            Step("ten pairs", _transfer(10, "[]")),
            Step("MTL-FT", _transfer(10, "[mtl-ft]")),
            Step("a second seed alone and together", _transfer(10, "[mtl-ft]"), n_seeds=2),
            Step("ours", _transfer(10, "[mtl-ft, ours]"), n_seeds=2),
            Step("21 pairs", _transfer(21, "[mtl-ft, ours]"), n_seeds=2),
            Step("all 45 pairs", _transfer(45, "[mtl-ft, ours]"), n_seeds=2),
        ),
        ("sectionB.6", "figure11"),
    ),
    "sharpness": Study(
        "sharpness-cpu.yaml",
        20.0,
        ("ranks=[4, 16, 64]", "ensemble_sizes=[1, 2, 4]", "total_rank=64", "n_examples=6", "weight_coordinates=false"),
        (
            Step("RTE and COPA, ranks", ("parts=[rank]", _ONE_SCALE, *_SHORT)),
            Step("ensembles", ("parts=[rank, ensemble]", _ONE_SCALE, *_SHORT)),
            Step("a fixed alpha", ("parts=[rank, ensemble]", _TWO_SCALES, *_SHORT)),
            Step("BoolQ", ("parts=[rank, ensemble]", _TWO_SCALES, *_LONG)),
        ),
        ("figure6",),
    ),
    "similarity": Study(
        "analysis-cpu.yaml",
        10.0,
        ("base_methods=[lora]", "n_subsets=2"),
        (
            Step("all ten tasks", ("sizes=[10]",)),
            Step("pairs", ("sizes=[2, 10]",)),
            Step("subsets of four", ("sizes=[2, 4, 10]",)),
            Step("subsets of seven", ("sizes=[2, 4, 7, 10]",)),
        ),
        ("figure12",),
    ),
}


class OutOfTime(KeyboardInterrupt):
    """The minutes are over: what a user's interruption is, too."""


def main() -> None:
    """Carry out one analysis, or all, as far as the minutes go."""
    arguments = read_arguments()
    torch.set_num_threads(arguments.threads)
    names = tuple(STUDIES) if arguments.name == "all" else (arguments.name,)
    whole = sum(STUDIES[name].minutes for name in names)
    began, share, records = time.monotonic(), 0.0, 0
    for name in names:
        share += STUDIES[name].minutes / whole
        deadline = None if arguments.minutes is None else began + 60 * arguments.minutes * share
        records += measure(name, arguments, deadline)
    if not records:
        raise SystemExit("nothing was finished in time; the same command goes on")


def read_arguments() -> argparse.Namespace:
    """What to measure, and for how long."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("name", nargs="?", default="all", choices=(*STUDIES, "all"))
    parser.add_argument("--minutes", type=float, help="stop after so many; the same command goes on")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--recipe", type=Path, help="in place of the analysis' own")
    parser.add_argument("--out", type=Path, help="folder of what is trained and measured; by default RUN-analysis")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--with", action="append", default=[], metavar="KEY=VALUE", dest="options",
                        help="change an option of the analysis, in every step")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the records")
    parser.add_argument("--leave-record", action="store_true", help="write none")
    return parser.parse_args()


def measure(name: str, arguments: argparse.Namespace, deadline: float | None) -> bool:
    """Carry out the steps of one analysis that are not finished, as far as time goes, and keep the record.

    Returns:
        Whether there is anything to keep.
    """
    study, analysis = STUDIES[name], find_analysis(name)
    n_done, n_steps = count_finished(name, arguments), len(study.steps)
    if n_done == n_steps:
        say(f"{name}: finished before")
        keep(name, n_done, arguments)
    try:
        with ending_at(deadline):
            for step in study.steps[n_done:]:
                say(f"{name}, step {n_done + 1} of {n_steps}: {step.title}")
                request = ask(name, step, arguments)  # now: it reads what the former step left
                write_page(request.folder.parent, analysis, carry_out(analysis, request))
                n_done += 1
                keep(name, n_done, arguments)
    except OutOfTime:
        say(f"{name}: out of time, {n_done} of {n_steps} steps are finished")
    return n_done > 0


def ask(name: str, step: Step, arguments: argparse.Namespace) -> AnalysisRequest[Any]:
    """Put one step's request together, as the command line would."""
    study, analysis = STUDIES[name], find_analysis(name)
    config = read_request(arguments.recipe or RECIPES / study.recipe, tuple(arguments.set))
    options = read_options(analysis, (*study.options, *step.options, *arguments.options))
    home = arguments.out or Path(f"{config.out}-analysis")
    return make_request(analysis, config, options, n_seeds=step.n_seeds, home=home)


def count_finished(name: str, arguments: argparse.Namespace) -> int:
    """How many steps are finished: the result that is there is that of the last one."""
    requests = [ask(name, step, arguments) for step in STUDIES[name].steps]
    home = requests[0].folder.parent
    if find_result(home, name) is None:
        return 0
    found = read_result(home, name)
    for place, request in reversed(list(enumerate(requests))):
        asked = {
            "options": request.options.model_dump(mode="json"),
            "seeds": list(request.seeds),
            "config": request.config.model_dump(mode="json"),
        }
        if all(found[key] == value for key, value in asked.items()):
            return place + 1
    return 0


def keep(name: str, n_done: int, arguments: argparse.Namespace) -> None:
    """Write the record of the steps that are finished."""
    study = STUDIES[name]
    last, titles = ask(name, study.steps[n_done - 1], arguments), [step.title for step in study.steps]
    home = last.folder.parent
    found = read_result(home, name)
    spent = found["costs"]["total"]
    result = {
        "n_steps": n_done,
        "is_whole": n_done == len(titles),
        "steps_done": titles[:n_done],
        "steps_left": titles[n_done:],
        "n_fine_tunings": found["costs"]["training"]["n"],
        "seconds": spent["seconds"],
        "flops": spent["flops"],
        "peak_memory_bytes": spent["peak_memory_bytes"],
        "headline": find_analysis(name).headline(found),
        "exhibits": {exhibit: made for exhibit in study.exhibits if (made := make_exhibit(exhibit, home))},
        "outcome": {**found, "config": {key: value for key, value in found["config"].items() if key != "out"}},
    }
    config = {
        "analyze": write_command(name, last, arguments),
        "recipe": last.config.model_dump(mode="json", exclude={"out"}),
        "options": last.options.model_dump(mode="json"),
        "n_seeds": len(last.seeds),
        "threads": arguments.threads,
    }
    keep_record(f"analysis-{name}", config, shorten(result), as_json=arguments.json, is_kept=not arguments.leave_record)


def make_exhibit(exhibit: str, home: Path) -> dict[str, Any] | None:
    """A table or figure of the paper, of what is finished; none where that is not enough for it."""
    try:
        return asdict(reproduce(exhibit, [home]))
    except UsageError:
        return None


def write_command(name: str, request: AnalysisRequest[Any], arguments: argparse.Namespace) -> str:
    """A step as a user would ask for it."""
    recipe = arguments.recipe or Path("recipes", STUDIES[name].recipe)
    changed = request.options.model_dump(mode="json", exclude_unset=True)
    options = [word for key, value in changed.items() for word in ("--with", f"{key}={write_value(value)}")]
    sets = [word for one in arguments.set for word in ("--set", one)]
    words = ["ensemblelora", "analyze", name, str(recipe), *sets, "--seeds", str(len(request.seeds)), *options]
    return shlex.join(words)


def write_value(value: object) -> str:
    """YAML on a line, for words and numbers and lists of them."""
    if isinstance(value, list):
        return f"[{', '.join(map(write_value, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def shorten(value: Any) -> Any:
    """Plain values with fewer digits."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: shorten(one) for key, one in value.items()}
    return [shorten(one) for one in value] if isinstance(value, list | tuple) else value


@contextmanager
def ending_at(deadline: float | None) -> Iterator[None]:
    """Interrupt what is inside at a time, as a user would, also in the background, where shells have SIGINT ignored."""

    def interrupt(*_: object) -> None:
        raise OutOfTime

    if deadline is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(deadline - time.monotonic(), 0.001))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def say(text: str) -> None:
    """Tell what goes on."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
